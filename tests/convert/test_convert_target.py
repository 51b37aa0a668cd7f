"""A target directory appears when it is complete; what a killed run leaves is no model, and is cleaned up."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evalq.convert.target import new_directory
from evalq.errors import SpecError, StoreError

WRITER = """
import sys, time
from pathlib import Path
from evalq.convert.target import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "models" / "new"
    with new_directory(target) as partial:
        (partial / "a").write_text("a")
        assert partial.parent == target.parent
        assert partial.name.startswith("new.partial-")
        assert not target.exists()
    assert names(target.parent) == ["new"]
    assert names(target) == ["a"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "new") as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_a_target_that_exists_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "new"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"new exists already \(name a directory that does not"):
        new_directory(target).__enter__()
    assert names(tmp_path) == ["new"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="exists already"), new_directory(tmp_path / "new") as partial:
        (partial / "a").write_text("a")
        (tmp_path / "new").mkdir()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == []


def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model[1]"  # a name with a glob's signs in it
    process = start_writer(target)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    left = names(tmp_path)
    assert len(left) == 2
    assert all(name.startswith("model[1].partial-") for name in left)
    with new_directory(target) as partial:
        (partial / "whole").write_text("whole")
    assert names(tmp_path) == ["model[1]"]
    assert names(target) == ["whole"]


def test_a_run_that_is_still_going_is_left_alone(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "new")
    try:
        going = names(tmp_path)
        with new_directory(tmp_path / "new") as partial:
            (partial / "a").write_text("a")
            assert set(going) < set(names(tmp_path))
        assert names(tmp_path) == ["new", *going]
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file"):
        new_directory(tmp_path / "file" / "new").__enter__()
    assert names(tmp_path) == ["file"]
