"""evalq.toml: which file counts, which may name a program, and what else one may hold."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evalq.cli.main import compare_main, main
from evalq.errors import SpecError
from evalq.spec import ModelSpec, config
from evalq.spec.config import engine_python, python_for, read_config, user_config


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that leaves a trace when it is run, and then is a Python."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho run >> "{tmp_path}/trace"\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def was_run(tmp_path: Path) -> Callable[[], bool]:
    return (tmp_path / "trace").exists


def names_all(program: Path) -> str:
    engines = ("hf", "gguf", "vllm", "exl3", "fake", "server")
    return "".join(f'[engines.{engine}]\npython = "{program}"\n' for engine in engines)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", [["inspect", "tiny"], ["backends"], ["env"], ["env", "--json"]])
@pytest.mark.parametrize("where", ["here", "above", "git work tree"])
def test_a_file_beside_a_download_starts_nothing(
    tiny: Path,
    program: Path,
    was_run: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    where: str,
) -> None:
    write(Path("evalq.toml"), names_all(program))
    if where == "git work tree":
        write(Path(".git/config"), "[core]\n")
    if where == "above":
        Path("below").mkdir()
        (Path("below") / "tiny").symlink_to(tiny)
        monkeypatch.chdir("below")
    assert main(command) == 0
    assert not was_run()
    out, err = capfd.readouterr()
    said = " ".join((out + err).split())
    assert "this folder is not trusted" in said and "--config" in said


def test_a_comparison_refuses_it_before_anything_runs(
    runs: Callable[..., object],
    program: Path,
    was_run: Callable[[], bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(Path("evalq.toml"), names_all(program))
    code = compare_main(["-d", str(runs.data()), "-m", str(runs.models({}))])
    assert code == 2 and not was_run()
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "this folder is not trusted" in line and "--config" in line


@pytest.mark.parametrize("how", ["--config", "variable", "own", "trusted"])
def test_what_the_user_named_is_used(
    program: Path,
    was_run: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    found, more = Path("evalq.toml"), []
    if how == "--config":
        monkeypatch.setenv("EVALQ_CONFIG", "replaced by the flag, restored after the test")
        more = ["--config", str(write(found, names_all(program)))]
    elif how == "variable":
        monkeypatch.setenv("EVALQ_CONFIG", str(write(found, names_all(program))))
    elif how == "own":
        write(user_config(), names_all(program))
    else:
        write(found, names_all(program))
        write(user_config(), f'trusted = ["{Path.cwd()}"]')
    assert main(["backends", *more]) == 0
    assert was_run() and "not trusted" not in capsys.readouterr().out


def test_the_folder_that_this_evalq_runs_from(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "evalq.toml", names_all(program))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert engine_python("hf") == str(program)
    path.chmod(0o666)
    with pytest.raises(SpecError, match="others can write that file .chmod go-w"):
        engine_python("hf")
    path.chmod(0o664)
    os.chown(path, os.getuid(), os.getuid()) if os.getuid() == 0 else None
    if path.stat().st_gid == path.stat().st_uid:
        assert engine_python("hf") == str(program), "the user's own group, as a umask of 002 makes it"


def test_an_environment_further_down_vouches_for_nothing(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "evalq.toml", names_all(program))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "somewhere" / ".venv"))
    with pytest.raises(SpecError, match="this folder is not trusted"):
        engine_python("hf")


def test_which_file_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pythons = {name: str(write(tmp_path / "bin" / name, "")) for name in ("own", "here", "named", "spec")}
    spec = ModelSpec(load_fn="hf", model_dir=".", python=pythons["spec"])
    assert engine_python("hf") is None
    write(user_config(), f'trusted = ["{tmp_path}"]\n[engines.hf]\npython = "{pythons["own"]}"')
    assert engine_python("hf") == pythons["own"]
    write(tmp_path / "evalq.toml", f'[engines.hf]\npython = "{pythons["here"]}"')
    assert engine_python("hf") == pythons["here"]
    monkeypatch.setenv("EVALQ_CONFIG", str(write(tmp_path / "x.toml", '[engines.hf]\npython = "bin/named"')))
    assert engine_python("hf") == pythons["named"] and engine_python("vllm") is None
    assert python_for(spec, "hf") == pythons["spec"]


def test_a_named_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALQ_CONFIG", "none.toml")
    with pytest.raises(SpecError, match="none.toml: no such file"):
        engine_python("hf")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("engines = 3", "engines: input should be a valid dictionary, not 3"),
        ("[engines]\nhf = 3", "engines.hf: input should be"),
        ("[engines.hf]\npython = 3", "engines.hf.python: input should be a valid string, not 3"),
        ("[engines.hf]\npythn = 'x'", 'engines.hf.pythn: unknown key .did you mean "python"'),
        ("[engines.hf]", "engines.hf.python: field required"),
        ("[engine.hf]\npython = 'x'", 'engine: unknown key .did you mean "engines"'),
        ("[[engines]]\npython = 'x'", "engines: input should be a valid dictionary"),
        ("[engines.hf]\npython = '~nouser-at-all/python'", "engines.hf.python: could not determine home"),
        ('[engines.hf]\npython = "a\\u0000b"', "engines.hf.python: holds a NUL character"),
        (f"[engines.hf]\npython = '{'x' * 300}'", "longer than 255 bytes"),
        ("trusted = 'x'", "trusted: input should be a valid list"),
        ("a = " + "[" * 5000, "nested too deep"),
        ("a = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
        ("a = \x00", "not valid TOML"),
        ("\n".join(f"key{i} = 1" for i in range(20_000)), "larger than"),
        ("\n".join(f"k{i} = 1" for i in range(1_500)), "k0: unknown key"),
        (".".join("a" * 20_000) + " = 1", "larger than"),
        (".".join("a" * 8_000) + " = 1", "a: unknown key"),
    ],
)  # fmt: skip
def test_what_is_no_evalq_toml_is_one_line_and_quick(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "evalq.toml", text)
    started = time.monotonic()
    with pytest.raises(SpecError, match=says) as caught:
        read_config(path)
    assert time.monotonic() - started < 10
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "evalq.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8"):
        read_config(path)


def test_the_users_file_is_where_the_system_keeps_such_files(tmp_path: Path) -> None:
    assert config.user_config().name == "evalq.toml"
    if sys.platform == "linux":
        assert config.user_config() == tmp_path / "config" / "evalq" / "evalq.toml"
