"""The real command on a real terminal of 80 columns, with labels that try to take it over."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, Runs
from rich.cells import cell_len

from evalq.cli.main import COMMANDS

EVIL = "Evil \x1b]0;owned\x07\x1b[2J\x9b31m [red]:dog: \u202eabc"
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(runs: Runs, columns: int, *command: str) -> str:
    """What the command writes to a terminal, rich's own colours and cursor left out."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        command,
        cwd=runs.folder,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    process.wait(timeout=60)
    return COLOURS.sub("", written.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 160])
def test_compare_and_results_fit_and_obey_nothing(runs: Runs, columns: int) -> None:
    long = "Llama-3.1-8B-Instruct GPTQ-INT4 group 128 act-order"
    labels = [long, "BF16 | a", EVIL]
    models = runs.models(
        *({"label": label, "options": {"seed": i, "mode": "hashed"}} for i, label in enumerate(labels)),
        {"label": "uniform", "options": {"mode": "uniform", "vocab_size": 2500}},
        {"label": EVIL + " fails", "model_dir": "/none/\x1b[2J"},
    )
    compare = [sys.executable, str(ROOT / "compare.py"), "-d", str(runs.data()), "-m", str(models)]
    for command in (compare, [sys.executable, "-m", "evalq", "results"]):
        out = on_terminal(runs, columns, *command)
        assert long in out and "BF16 | a" in out and re.search(r"2,(500|499)\.\d{4} ", out)
        assert not set("\x1b\x07\x9b\u202e") & set(out)
        assert "Evil \\x1b]0;owned\\x07\\x1b[2J\\x9b31m [red]:dog: \\u202eabc" in out
        table = out[out.index("\n\n") :].partition("\n\n\n")[0].partition("no room for")[0].strip("\n")
        assert all(cell_len(line) <= columns for line in table.split("\n\n")[0].splitlines())


@pytest.mark.parametrize("command", ["backends", "env"])
def test_other_tables_fit_80_columns(runs: Runs, command: str) -> None:
    out = on_terminal(runs, 80, sys.executable, "-m", "evalq", command)
    assert "llama-cpp-python" in out
    assert all(cell_len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_fits_the_terminal_and_loses_no_word(command: str, columns: str) -> None:
    asked = [sys.executable, "-m", "evalq", *filter(None, [command]), "--help"]

    def said(columns: str) -> str:
        return subprocess.run(
            asked, env=os.environ | {"COLUMNS": columns}, capture_output=True, text=True, check=True
        ).stdout

    out = said(columns)
    assert max(map(len, out.splitlines())) <= int(columns)
    assert sorted(out.split()) == sorted(said("200").split())


def test_a_pipe_gets_whole_lines(runs: Runs) -> None:
    label = "x" * 150
    models = runs.models({"label": label}, {"label": "b", "options": {"seed": 2}})
    process = runs.process("-d", str(runs.data()), "-m", str(models), env=os.environ | {"COLUMNS": "80"})
    out, _ = process.communicate(timeout=60)
    (line,) = (line for line in out.splitlines() if line.startswith(label))
    assert line.split()[-1].startswith("1") or line.split()[-1] == "ok"


def test_errors_are_not_obeyed_either(runs: Runs) -> None:
    for more in (
        ["-d", "\x1b[2Jnone.json", "-m", "x"],
        ["-d", "x", "-m", "y", "--\x1b[2J"],
        ["--max-rows", "\x1b["],
    ):
        _, errors = runs.process(*more).communicate(timeout=60)
        assert "\x1b[2J" not in errors and "\\x1b[" in errors


def test_another_encoding_of_the_terminal_ends_nothing(runs: Runs) -> None:
    models = runs.models({"label": "模型 ü"}, {"label": "b", "model_dir": "/none"})
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = runs.process("-d", str(runs.data()), "-m", str(models), env=environment)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors and "\\u6a21" in out
    assert Path(models).exists()
