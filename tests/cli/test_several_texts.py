"""The command with several texts: charts, statistics, outputs, and the commands that read their results."""

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import Runs

from evalq.cli.main import main


def two(runs: Runs) -> list[Path]:
    """Two data specs on the shipped sample."""
    return [
        runs.data(f"{length}.json", eval_len=length, eval_stride=length, max_rows=4) for length in (64, 128)
    ]


def three_models(runs: Runs) -> Path:
    return runs.models({}, {"options": {"seed": 1}}, {"options": {"seed": 2}})


def compare(runs: Runs, *more: str, data: list[Path] | None = None) -> int:
    texts = map(str, two(runs) if data is None else data)
    return main(["compare", "-d", *texts, "-m", str(three_models(runs)), *more])


def test_each_text_has_a_chart_named_after_it(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "-o", "chart.svg", "-t", "Mine") == 0
    assert sorted(path.name for path in runs.folder.glob("*.svg")) == [
        "chart-sample-len-128.svg",
        "chart-sample-len-64.svg",
    ]
    assert "Mine: sample len 64" in (runs.folder / "chart-sample-len-64.svg").read_text()
    assert "chart: chart-sample-len-64.svg" in capsys.readouterr().err
    assert compare(runs, "-p") == 0
    assert sorted(path.name for path in (runs.folder / "plots/out").iterdir()) == [
        "models-sample-len-128.png",
        "models-sample-len-64.png",
    ]


def test_one_chart_of_the_means(runs: Runs) -> None:
    assert compare(runs, "--chart-mean", "-o", "chart.svg") == 0
    (found,) = runs.folder.glob("*.svg")
    assert found.name == "chart.svg" and "mean of 2 texts" in found.read_text()
    assert compare(runs, "--chart-mean") == 0
    (found,) = (runs.folder / "plots/out").iterdir()
    assert found.name == "64-128-models-mean.png"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--chart-mean draws means over texts, and -d names one (name several texts with -d)"),
        (("--by-position",), "--chart-mean and --by-position are two charts (leave one of them out)"),
    ],
)
def test_a_chart_that_cannot_be_is_refused_before_anything_is_scored(
    runs: Runs, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    data = two(runs) if more else [runs.data()]
    assert compare(runs, "--chart-mean", *more, data=data) == 2
    assert said in capsys.readouterr().err and not (runs.folder / "store").exists()


def test_a_chart_of_divergence_without_any_says_so_for_each_text(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(runs, "-kld", "-o", "chart.png") == 0
    errors = capsys.readouterr().err
    assert errors.count("no chart of sample len ") == 2 and not list(runs.folder.glob("*.png"))
    assert compare(runs, "-kld", "--chart-mean", "-o", "chart.png") == 0
    assert "no chart: no model has a mean over all texts" in capsys.readouterr().err


def test_statistics_are_text_by_text(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "--significance", "--resolve", "1%") == 0
    out = capsys.readouterr().out
    assert out.count("change of perplexity per token, row against column") == 2
    assert "\nsample len 64:\n" in out and "\nsample len 128:\n" in out
    assert "\nsample len 64: Fake 1: " in out and "\nsample len 128: Fake 2: " in out


def test_outputs_hold_every_text(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "--csv", "-", "--json", "all.json", "--markdown", "all.md") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == 6 and {line["dataset"] for line in lines} == {"sample len 64", "sample len 128"}
    found = json.loads((runs.folder / "all.json").read_text())
    assert [len(found[key]) for key in ("texts", "records", "means")] == [2, 6, 3]
    ratios = [r["against_reference"]["ln_ratio"] for r in found["records"] if r["label"] == "Fake 1"]
    assert found["means"][1]["ln_ratio"]["value"] == pytest.approx(sum(ratios) / 2)
    assert "PPL per token, sample len 64" in (runs.folder / "all.md").read_text()


def test_quiet_failures_name_their_text(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"misbehave": "oom-forward", "misbehave_from": 128}
    models = runs.models({"options": options})
    assert main(["compare", "-d", *map(str, two(runs)), "-m", str(models), "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evalq: Fake 0 on sample len 128: ")


def test_other_commands_show_the_texts_apart(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "-q") == 0
    assert main(["results"]) == 0
    out = capsys.readouterr().out
    assert "4 windows of 64 tokens" in out and "4 windows of 128 tokens" in out and out.count("Fake 1 ") >= 2
    assert main(["tokens", "Fake 1"]) == 2
    assert "choose the text with -d" in capsys.readouterr().err
    assert main(["tokens", "Fake 1", "-d", str(two(runs)[1]), "-n", "3"]) == 0
    assert capsys.readouterr().out
