"""`evalq results`: it only reads, and one bad file hides nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Runs

from evalq.cli.main import main

GOOD = "Whole one"


def listed(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["results", *more]) == 0
    return capsys.readouterr().out


def folders(runs: Runs) -> dict[str, Path]:
    """Folders of results, by label."""
    files = (runs.folder / "store" / "results").glob("*/identity.json")
    return {json.loads(file.read_text())["label"]: file.parent for file in files}


@pytest.fixture
def store(runs: Runs) -> Runs:
    killed = {"label": "Half way", "options": {"misbehave": "kill", "misbehave_after": 4}}
    other = {"label": "Other one", "options": {"seed": 1}}
    runs.compare(runs.data(), runs.models({"label": GOOD}, killed, other))
    return runs


BAD = (b"", b"[]", b"3", b"{", b"\xff\xfe", b'{"label": 5, "comparison": []}', b"[" * 100_000)


@pytest.mark.parametrize("name", ["record.json", "identity.json", "failure.json", "scores.safetensors"])
def test_a_bad_file_hides_no_other_result(store: Runs, capsys: pytest.CaptureFixture[str], name: str) -> None:
    bad = [folders(store)[label] / name for label in ("Half way", "Other one")]
    for content in BAD:
        for file in bad:
            file.write_bytes(content)
        out = listed(capsys)
        assert GOOD in out and "windows of 256" in out
        assert GOOD in [record["label"] for record in json.loads(listed(capsys, "--json"))]


def test_a_damaged_record_is_said(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    (folders(store)["Other one"] / "record.json").write_text("{}")
    out = listed(capsys)
    assert "Other one" in out and "its record cannot be read" in out


def test_foreign_text_in_a_store_is_not_obeyed(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders(store)["Half way"]
    (folder / "identity.json").write_text(json.dumps({"label": "\x1b[2J[red]\u202e", "windows": "\x9b"}))
    (folder / "failure.json").write_text(json.dumps({"category": "\x1b", "message": "\x1b]0;t\x07"}))
    out = listed(capsys)
    assert not set("\x1b\x9b\u202e\x07") & set(out) and "\\x1b[2J[red]\\u202e" in out


def test_nothing_is_made_or_changed(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    root = store.folder / "store"
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    listed(capsys)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before
    assert "holds no results yet" in listed(capsys, "--store", "nowhere")
    assert json.loads(listed(capsys, "--store", "nowhere", "--json")) == []
    assert not Path("nowhere").exists()


WATCHED = """
import os, sys
def watch(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
        assert not str(arguments[0]).startswith(sys.argv[1]), f"opened for writing: {arguments[0]}"
    assert event not in ("os.mkdir", "os.rename", "os.remove", "os.utime", "os.chmod"), (event, arguments)
from evalq.cli.main import main
sys.addaudithook(watch)
sys.exit(main(["results", "--store", sys.argv[1]]))
"""


def test_a_read_only_store_is_read(store: Runs) -> None:
    """Nothing is opened for writing, which is all that a read-only store asks for."""
    command = [sys.executable, "-c", WATCHED, str(store.folder / "store")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and GOOD in run.stdout, run.stderr


def test_a_store_of_another_place_is_read(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(store.folder / "store", store.folder / "moved")
    assert GOOD in listed(capsys, "--store", "moved")
