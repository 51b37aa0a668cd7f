"""`evalq compare --significance` and `--resolve`, on real results."""

import csv
import json
import math
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


@pytest.mark.parametrize("n_texts", [1, 2])
def test_every_pair_is_in_json_and_csv(runs: Runs, n_texts: int) -> None:
    labels = ("R", "A", "=B\nC")
    specs = [{"label": label, "options": {"seed": seed}} for seed, label in enumerate(labels)]
    texts = [str(runs.data(f"{length}.json", eval_len=length, max_rows=8)) for length in (64, 48)[:n_texts]]
    files = runs.folder / "found.json", runs.folder / "found.csv"
    flags = ["-q", "--store", str(runs.folder / "store"), "--json", str(files[0]), "--csv", str(files[1])]
    command = ["-d", *texts, "-m", str(runs.models(*specs)), *flags]
    assert compare_main([*command, "--significance"]) == 0
    found = json.loads(files[0].read_text())
    records = found if n_texts == 1 else found["records"]
    lines = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(records) == len(lines) == 3 * n_texts
    for record, line in zip(records, lines, strict=True):
        pairs = {pair["other"]: pair for pair in record["beside_others"]}
        assert set(pairs) == set(labels) - {record["label"]}
        for other, pair in pairs.items():
            (beside,) = (
                r
                for r in records
                if r["label"] == other and r["comparison"]["eval_len"] == record["comparison"]["eval_len"]
            )
            ratio = math.log(record["ppl"] / beside["ppl"])
            assert pair["quantity"] == "ppl" and pair["difference"]["value"] == pytest.approx(ratio, abs=1e-6)
            (turned,) = (back for back in beside["beside_others"] if back["other"] == record["label"])
            assert turned["p_holm"] == pair["p_holm"] and pair["differs"] == (pair["p_holm"] < 0.05)
            name = other.replace("\n", "\\n")
            assert float(line[f"ln_ratio[{name}]"]) == pair["difference"]["value"]
            assert float(line[f"ln_ratio_p[{name}]"]) == pair["p_holm"]
    assert compare_main(command) == 0
    assert "p_holm" not in files[0].read_text() and "ln_ratio[" not in files[1].read_text()


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
