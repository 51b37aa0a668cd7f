"""`evalq compare --significance` and `--resolve`, on real results."""

import re
from pathlib import Path

import pytest
from conftest import Runs

from evalq.cli.main import compare_main
from evalq.cli.numbers import share


def models(runs: Runs) -> Path:
    return runs.models({"label": "R", "reference": True}, {"label": "A", "options": {"seed": 1}})


def test_both_are_printed_below_the_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.data(eval_len=64, eval_stride=64, max_rows=20)
    assert runs.compare(data, models(runs), more=("--significance", "--resolve", "0.5%"))[0] == 0
    out = capsys.readouterr().out
    assert re.search(r"^1 R +· ", out, re.MULTILINE) and re.search(r"^2 A .*·", out, re.MULTILINE)
    assert re.search(
        r"^A: ± 0.5 % takes about [\d,]+ windows; 20 windows give ± [\d.]+ %$", out, re.MULTILINE
    )
    assert "R: ±" not in out


def test_results_on_standard_output_stay_alone_there(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    specs = ["-d", str(runs.data()), "-m", str(models(runs))]
    assert compare_main([*specs, "--csv", "-", "--significance", "--resolve", "1%"]) == 0
    out, errors = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "takes about" not in out and "±" not in out
    assert "takes about" in errors and "change of perplexity per token, row against column" in errors


def test_one_model_is_beside_none(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.compare(runs.data(), runs.models({}), more=("--significance", "--resolve", "0.5%"))[0] == 0
    out = capsys.readouterr().out
    assert "nothing to compare" in out and "no model was compared with a reference" in out


@pytest.mark.parametrize(
    ("text", "value"), [("0.5%", 0.005), ("0.005", 0.005), (" 2 %", 0.02), ("1e-3", 0.001)]
)
def test_a_share_is_a_percentage_or_a_part_of_one(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "-1%", "100%", "1", "half", "", "%", "nan", "inf%", "5 percent"])
def test_what_is_no_share_is_a_usage_error(runs: Runs, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_main(["-d", "sample.json", "-m", "x", f"--resolve={text}"])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and "--resolve" in errors.splitlines()[-1] and "Traceback" not in errors
