"""What `evalq inspect` prints: nothing in a checkpoint's files is obeyed by a terminal, and it fits."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny
from result_records import terminal
from rich.cells import cell_len
from safetensors.numpy import load_file, save_file

from evalq.cli.main import main
from evalq.inspect import inspect_checkpoint, open_model
from evalq.show.inspection import print_inspection

EVIL = "\x1b[2J\x9b31m[red]:dog:\u202e"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A checkpoint whose names are terminal escapes."""
    folder = make_tiny(tmp_path / "evil", architectures=[EVIL], quantization_config={"quant_method": EVIL})
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.{EVIL}.weight"] = np.zeros((8, 8), np.float16)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_names_in_files_are_shown_and_not_obeyed(evil: Path, columns: int) -> None:
    found = inspect_checkpoint(open_model(str(evil), None, True))
    out = terminal(lambda console: print_inspection(found, console, True), columns)
    assert not set("\x1b\x9b\u202e") & set(out)
    assert "[red]:dog:" in out.replace("\n", "").replace(" ", "")


def test_json_holds_the_names_and_no_escape(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(evil), "--json", "--per-tensor"])
    out = capsys.readouterr().out
    assert not set("\x1b\x9b\u202e") & set(out)
    assert any(EVIL in tensor["name"] for tensor in json.loads(out)["tensors"])


def test_80_columns_hold_it(tiny: Path) -> None:
    found = inspect_checkpoint(open_model(str(tiny), None, True))
    out = terminal(lambda console: print_inspection(found, console, False), 80)
    assert all(cell_len(line) <= 80 for line in out.splitlines()), out
    assert "engine" in out and "runs here" in out and "bpw" in out
