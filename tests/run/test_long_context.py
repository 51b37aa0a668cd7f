"""Long windows through the whole command: records, tables, CSV, the chart, what is refused."""

import csv
import json
from pathlib import Path

import pytest
from conftest import Runs

from evalq.cli.main import compare_main


def long_text(runs: Runs, n: int = 9000) -> Path:
    """Bytes are the fake engine's tokens."""
    text = " ".join(f"word {i % 97}" for i in range(n))[:n]
    return runs.data(
        dataset="text", path=str(runs.write("long.txt", text)), protocol="long", eval_len=4096,
        eval_stride=None, max_rows=None,
    )  # fmt: skip


def test_records_hold_buckets_of_the_model_and_of_the_pair(runs: Runs) -> None:
    models = runs.models({}, {"options": {"seed": 1}})
    code, (first, second) = runs.compare(long_text(runs), models, more=("--reference", "Fake 0"))
    assert code == 0 and first["comparison"]["windows"] == 3
    for record in (first, second):
        found = record["by_position"]
        assert [(at["start"], at["stop"]) for at in found] == [(0, 1024), (1024, 2048), (2048, 4096)]
        assert sum(at["tokens"] for at in found) == record["tokens_scored"] == 9000 - 3
        assert {"ppl", "nll_nats"} == set(found[0]["metrics"])
    beside = second["against_reference"]["by_position"]
    assert first["against_reference"] is None
    for own, reference, pair in zip(second["by_position"], first["by_position"], beside, strict=True):
        apart = own["metrics"]["nll_nats"]["value"] - reference["metrics"]["nll_nats"]["value"]
        assert pair["metrics"]["ln_ratio"]["value"] == pytest.approx(apart, rel=1e-6)
        assert pair["metrics"]["ln_ratio"]["stderr"] > 0, "three windows are cut into enough stretches"


def test_stored_results_get_buckets_without_being_scored_again(runs: Runs) -> None:
    runs.compare(long_text(runs), runs.models({}))
    stored = next((runs.folder / "store" / "results").glob("*/record.json"))
    record = json.loads(stored.read_text())
    stored.write_text(json.dumps(record | {"by_position": []}))
    _, (again,) = runs.compare(long_text(runs), runs.models({}))
    assert again["by_position"] == record["by_position"] and again["scored_at"] == record["scored_at"]


def test_tables_csv_markdown_and_chart(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({}, {"options": {"seed": 1}})
    more = ("--positions", "--by-position", "-o", "c.png", "--csv", "t.csv", "--markdown", "t.md")
    runs.compare(long_text(runs), models, more=(*more, "--reference", "Fake 0"))
    out = capsys.readouterr().out
    assert "perplexity per token, by the number of tokens before a token" in out
    assert "change of perplexity against Fake 0" in out and "2k-4k" in out
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert float(rows[1]["ppl_2k_4k"]) > 1 and float(rows[1]["ln_ratio_2k_4k_stderr"]) > 0
    assert rows[0]["ln_ratio_2k_4k"] == "" and "kld_2k_4k" not in rows[0]
    markdown = Path("t.md").read_text()
    assert markdown.count("| model | 0-1k | 1k-2k | 2k-4k |") == 2
    assert Path("c.png").stat().st_size > 10_000


def test_several_texts_have_tables_and_a_chart_each(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({}, {"options": {"seed": 1}})
    other = runs.write("other.json", json.dumps(json.loads(long_text(runs).read_text()) | {"eval_len": 3000}))
    arguments = ["-d", str(long_text(runs)), str(other), "-m", str(models), "--reference", "Fake 0"]
    outputs = ["--positions", "--by-position", "-o", "c.svg", "--markdown", "t.md", "--csv", "t.csv"]
    assert compare_main([*arguments, *outputs]) == 0
    assert capsys.readouterr().out.count("perplexity per token, by the number") == 2
    assert Path("t.md").read_text().count("| model | 0-1k | 1k-2k | 2k-4k |") == 4
    assert len(list(Path().glob("c-*.svg"))) == 2 and not Path("c.svg").exists()
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(float(row["ppl_2k_4k"]) > 1 for row in rows)


def test_short_windows_say_what_to_do(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.compare(runs.data(), runs.models({}), more=("--positions", "--by-position"))[0] == 0
    found = capsys.readouterr()
    assert "no window is longer than 1024 tokens" in found.out and "no chart: by position" in found.err
    assert "--protocol long" in found.out and not Path("plots").exists()


def test_the_command_line_asks_for_long_windows(runs: Runs) -> None:
    data = runs.data(max_rows=1)
    _, (record,) = runs.compare(data, runs.models({}), more=("--protocol", "long"))
    assert record["comparison"]["eval_len"] == 8192, "not the data spec's 256, which is another protocol's"
    _, (record,) = runs.compare(data, runs.models({}), more=("--protocol", "long", "--eval-len", "3000"))
    assert record["comparison"]["eval_len"] == record["comparison"]["eval_stride"] == 3000
    assert record["tokens_scored"] == 2999


def test_more_tokens_than_positions_is_one_clear_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.tiny / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    code, (record,) = runs.compare(long_text(runs), runs.models({}))
    assert code == 1 and record["error"]["category"] == "window_too_long"
    assert record["error"]["message"] == "a window has 4095 tokens, the model has 2048 positions"
    assert "eval_len" in record["error"]["remedy"] and "2048" in record["error"]["remedy"]
    assert "4095" in capsys.readouterr().out
    assert compare_main(["-d", str(long_text(runs)), "-m", str(runs.models({})), "--eval-len", "2048"]) == 0
