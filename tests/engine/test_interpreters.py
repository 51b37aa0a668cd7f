"""Asking another interpreter what is installed for it."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from evalq.engine import interpreters
from evalq.engine.interpreters import ask, versions
from evalq.errors import ModelError
from evalq.version import __version__


def wrapper(folder: Path, before: str = "", command: str = 'exec {python} "$@"', name: str = "python") -> str:
    """A program that stands where an interpreter is expected."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{before}\n{command.format(python=shlex.quote(sys.executable))}\n")
    path.chmod(0o755)
    return str(path)


def site(folder: Path, name: str = "pluginengine", version: str = "9.8") -> Path:
    """A folder with one installed distribution."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_another_interpreter_says_what_this_one_says(tmp_path: Path) -> None:
    other, here = ask(wrapper(tmp_path)), ask(None)
    assert other.evalq == here.evalq == __version__
    assert (other.python, other.job_version) == (here.python, here.job_version)
    assert other.version("pydantic_core") == here.version("Pydantic.Core") is not None
    assert versions("hf", other.path) == versions("hf", None)
    assert versions("hf", sys.executable) == versions("hf", None)


def test_packages_of_pythonpath_count_as_they_do_for_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site(tmp_path / "module")))
    assert ask(wrapper(tmp_path)).version("pluginengine") == "9.8"


def test_the_current_folder_does_not_count(tmp_path: Path) -> None:
    site(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the current folder was imported')")
    assert ask(wrapper(tmp_path)).version("pluginengine") is None


def test_the_first_of_two_installations_is_the_one_that_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = site(tmp_path / "a", version="2"), site(tmp_path / "b", version="1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (first, second))))
    assert ask(wrapper(tmp_path)).version("pluginengine") == "2"


@pytest.mark.parametrize(
    "before",
    [
        "echo 'Loading module python/3.12 ...'",
        "echo 'a warning' >&2",
        "printf 'no newline at its end'",
        "printf '\\033[31m{\"packages\": {}}\\033[0m\\n'; printf '\\377\\376' >&2",
        "head -c 300000 /dev/zero | tr '\\0' 'x'",
    ],
    ids=["stdout", "stderr", "no newline", "JSON and bytes", "300 kB"],
)
def test_a_banner_is_ignored(tmp_path: Path, before: str) -> None:
    assert ask(wrapper(tmp_path, before)).evalq == __version__


def test_what_comes_after_the_answer_does_not_matter(tmp_path: Path) -> None:
    command = '{python} "$@"; echo bye; exit 3'
    assert ask(wrapper(tmp_path, command=command)).evalq == __version__
    command = '{python} "$@"; sleep 300'
    assert ask(wrapper(tmp_path, command=command, name="sleepy")).evalq == __version__


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo 'no license'; exit 7", "ended with code 7, its last line: no license"),
        ("exit 0", "ended with code 0"),
        ("kill -9 $$", "ended with code -9"),
        ("echo 'unknown option -P'; exit 2", "older than Python 3.11"),
        ("exec yes", "printed more than 1 MiB, its last line: y"),
        ("echo 'evalq-interpreter: [1]'", "gave a broken answer"),
        ("echo 'evalq-interpreter: {{\"packages\": 3}}'", "gave a broken answer"),
        ("printf '\\033[2Jcleared\\n'; exit 1", r"its last line: \[2Jcleared"),
    ],
)
def test_no_answer_is_one_line_with_a_reason(tmp_path: Path, command: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        ask(wrapper(tmp_path, command=command))
    assert caught.value.category == "engine_missing"
    assert str(caught.value).isprintable()


def test_a_hanging_interpreter_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "TIMEOUT_SECONDS", 0.5)
    python = wrapper(tmp_path, before=f"echo started >> {tmp_path}/log; sleep 300 &", command="sleep 300")
    for _ in range(2):
        with pytest.raises(ModelError, match="gave no answer within"):
            ask(python)
    assert (tmp_path / "log").read_text() == "started\n"


@pytest.mark.parametrize("kind", ["folder", "not executable", "missing", "NUL"])
def test_what_is_no_program(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "python"
    if kind == "folder":
        path.mkdir()
    elif kind == "not executable":
        path.write_text("#!/bin/sh\n")
    name = f"{path}\0" if kind == "NUL" else str(path)
    with pytest.raises(ModelError, match="cannot run the interpreter"):
        ask(name)


def test_an_interpreter_without_evalq(tmp_path: Path) -> None:
    python = wrapper(tmp_path, command='shift; exec {python} -I -S "$@"', name="a python")
    with pytest.raises(ModelError, match="evalq is not installed for") as caught:
        ask(python)
    assert caught.value.remedy == f"'{python}' -m pip install evalq"
