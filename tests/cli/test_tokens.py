"""`evalq tokens`: the result that is meant, its positions, their text; it only reads."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Runs

from evalq.cli.main import main
from evalq.data.sources import load_text
from evalq.results.record import read_record
from evalq.results.store import ResultDir, Store, family_of
from evalq.results.tokens import TokenColumns, encode
from evalq.spec import load_data_spec

TWO = {"label": "Two", "options": {"seed": 1}}


@pytest.fixture
def store(runs: Runs) -> Runs:
    """ "One", the reference, and "Two" on the sample text."""
    assert runs.compare(runs.data(), runs.models({"label": "One"}, TWO))[0] == 0
    return runs


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["tokens", *arguments]) == code
    found = capsys.readouterr()
    return found.out, found.err


def results(runs: Runs) -> dict[str, ResultDir]:
    found = Store(runs.folder / "store").results()
    return {json.loads((one.path / "identity.json").read_text())["label"]: one for one in found}


def with_divergence(runs: Runs) -> None:
    """Give both results what --kld would: the third token of "Two" diverges most, the first next."""
    by_label = results(runs)
    base = read_record(by_label["One"].path)
    assert base is not None
    ending = f"@{family_of(base.identity)[:16]}"
    for label, result in by_label.items():
        found = result.scores()
        assert found is not None
        argmax = np.full(found.window_of.size, ord("a" if label == "One" else "b"), np.int32)
        more: dict[str, Any] = {"argmax": argmax}
        if label == "Two":
            kld = np.zeros(found.window_of.size, np.float32)
            kld[[0, 2]] = [1.5, 2.5]
            more["kld" + ending] = kld
        columns = TokenColumns(
            {**found.columns, **more}, found.window_of, found.timing, found.windows, found.plan
        )
        (result.path / "scores.safetensors").write_bytes(encode(columns))


def test_positions_have_their_numbers_and_their_text(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = shown(capsys, "Two", "-n", "4", "--json")
    found = json.loads(out)
    assert (found["label"], found["reference"], found["by"]) == ("Two", "One", "delta_p")
    raw = load_text(load_data_spec(store.folder / "data.json"), Path("texts"), True).documents[0].encode()
    assert len(found["positions"]) == 4 and found["text_unknown"] is None
    sizes = [abs(one["delta_p"]) for one in found["positions"]]
    assert sizes == sorted(sizes, reverse=True) and len({one["position"] for one in found["positions"]}) == 4
    for one in found["positions"]:
        assert one["token"]["text"] == chr(one["token"]["id"])
        assert one["delta_p"] == pytest.approx(one["p_model"] - one["p_reference"])
        assert one["ln_ratio"] == pytest.approx(math.log(one["p_reference"] / one["p_model"]), abs=1e-4)
        assert one["kld"] is None and one["reference_guess"] is None
        at = one["position"]
        assert raw[at : at + 1].decode() == one["token"]["text"]
        assert raw[at - len(one["before"]) : at].decode() == one["before"] != ""


def test_by_divergence_where_it_was_measured(store: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    _, errors = shown(capsys, "Two", "--by", "kld", code=2)
    assert len(errors.splitlines()) == 1 and "--by delta_p" in errors and "--kld" in errors
    with_divergence(store)
    found = json.loads(shown(capsys, "Two", "-n", "2", "--json")[0])
    assert found["by"] == "kld" and [one["kld"] for one in found["positions"]] == [2.5, 1.5]
    assert [one["window"] for one in found["positions"]] == [0, 0]
    first, second = (one["position"] for one in found["positions"])
    assert first == second + 2
    assert found["positions"][0]["reference_guess"] == {"id": ord("a"), "text": "a"}
    assert found["positions"][0]["model_guess"] == {"id": ord("b"), "text": "b"}
    assert json.loads(shown(capsys, "Two", "--by", "ln_ratio", "--json")[0])["by"] == "ln_ratio"
    out, _ = shown(capsys, "Two", "-n", "2")
    assert "Two beside One: sample, 6 windows of 256 tokens" in out
    assert "2.5000" in out and '"a"' in out and '"b"' in out and "»" in out


def test_what_cannot_be_shown_is_one_line_with_what_to_do(
    store: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (("Tow",), 'did you mean "Two"'),
        (("One",), "is itself the reference (compared with it: Two)"),
        (("Two", "--store", "nowhere"), "holds no results yet"),
        (("Two", "-d", "nothing.json"), "nothing.json"),
    ):
        _, errors = shown(capsys, *arguments, code=2)
        assert len(errors.splitlines()) == 1 and words in errors, errors
    assert not Path("nowhere").exists()
    shutil.rmtree(store.folder / "store" / "tokens")
    _, errors = shown(capsys, "Two", code=2)
    assert "does not hold the tokens" in errors and "run the comparison again" in errors


def test_one_label_on_several_texts_is_told_apart(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "One"}, TWO)
    runs.compare(runs.data(), models)
    other = runs.write("other.txt", "Another text that is not the sample. " * 200)
    data = runs.data(dataset="text", path=str(other))
    runs.compare(data, models)
    runs.compare(runs.data(dataset="text", path=str(other), max_rows=3), models)
    _, errors = shown(capsys, "Two", code=2)
    line = errors.strip()
    assert "\n" not in line and '3 results are called "Two"' in line and "choose the text with -d" in line
    keys = [word for word in line.replace("(", " ").split() if len(word) == 12 and int(word, 16) >= 0]
    assert len(keys) == 3 and "3 windows" in line and "6 windows" in line and "sample" in line
    found = [json.loads(shown(capsys, key, "-n", "1", "--json")[0]) for key in keys]
    assert {one["key"][:12] for one in found} == set(keys)
    by_data = json.loads(shown(capsys, "Two", "-d", str(data), "-n", "1", "--json")[0])  # max_rows 3 by now
    assert by_data["positions"][0]["position"] < 3 * 256
    sample = json.loads(shown(capsys, "Two", "-d", str(runs.data()), "-n", "1", "--json")[0])
    assert sample["key"] not in (by_data["key"],) and len({sample["key"], by_data["key"]}) == 2
    third = runs.write("third.txt", "A third one. " * 400)
    _, errors = shown(capsys, "Two", "-d", str(third), code=2)
    assert "was not scored on" in errors and "stored:" in errors


def test_ids_stand_for_text_where_the_tokenizer_is_gone(
    store: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(store.tiny)
    found = json.loads(shown(capsys, "Two", "-n", "3", "--json")[0])
    assert all(one["token"]["text"] == f"<{one['token']['id']}>" for one in found["positions"])
    assert "not there" in found["text_unknown"] or "files" in found["text_unknown"]
    out, _ = shown(capsys, "Two", "-n", "3")
    assert "token ids stand for text" in out and "Traceback" not in out


def test_80_columns_hold_the_table(
    store: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_divergence(store)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    out, _ = shown(capsys, "Two", "-n", "5")
    assert "2.5000" in out and "no room for" in out


WATCHED = """
import os, sys
def watch(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
        assert not str(arguments[0]).startswith(sys.argv[1]), f"opened for writing: {arguments[0]}"
from evalq.cli.main import main
sys.addaudithook(watch)
code = main(["tokens", "Two", "--store", sys.argv[1]])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""


def test_the_store_is_only_read_and_no_engine_imported(store: Runs) -> None:
    command = [sys.executable, "-c", WATCHED, str(store.folder / "store")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "Two beside One" in run.stdout, run.stderr


def test_foreign_text_is_shown_and_not_obeyed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    evil = runs.write("evil.txt", "\x1b[2J\u202e[red]\x9b31m\n" * 300)
    models = runs.models({"label": "One"}, TWO)
    runs.compare(runs.data(dataset="text", path=str(evil)), models)
    out, _ = shown(capsys, "Two", "-n", "30")
    assert not set("\x1b\x9b\u202e") & set(out) and "\\x1b" in out
    raw, _ = shown(capsys, "Two", "-n", "30", "--json")
    assert not set("\x1b\x9b\u202e") & set(raw) and "\x1b" in json.loads(raw)["positions"][0]["before"]
