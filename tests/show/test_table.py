"""Tables of results: on terminals, as Markdown, as CSV, as JSON."""

import csv
import json
import math
import re
from typing import Any

import pytest
from markdown_it import MarkdownIt
from result_records import against, failed, record, terminal
from rich.cells import cell_len

from evalq.results.estimate import Estimate
from evalq.results.metrics import Metric
from evalq.results.paired import PairMetric
from evalq.results.record import AgainstReference, ResultRecord
from evalq.show import table

LONG = "Llama-3.1-8B-Instruct GPTQ-INT4 group 128 act-order"
EVIL = "\x1b[2J\x9b31m<script>alert(1)</script> [x](http://evil) a | b\n=1+1\u202e"


def on_terminal(records: list[ResultRecord], columns: int, is_terminal: bool = True) -> str:
    return terminal(lambda console: table.print_table(records, console), columns, is_terminal)


def comparison_of(*labels: str) -> list[ResultRecord]:
    first, *others = labels
    return [
        record(first, 1234.5678, layer_bpw=16.0),
        *(record(label, 4321.1234, against_reference=against(first)) for label in others),
    ]


@pytest.mark.parametrize("labels", [("BF16", "INT4"), (LONG, LONG + " 2"), ("BF16", "x" * 70)])
def test_80_columns_show_labels_and_perplexities_whole(labels: tuple[str, ...]) -> None:
    out = on_terminal(comparison_of(*labels), 80)
    for text in (*labels, "1,234.5678", "4,321.1234", "0.123", "+1.01 ± 0.20 %"):
        assert text in out, text
    rows = out.partition("─\n")[2].partition("\n\n")[0].splitlines()
    assert all(cell_len(line) <= 80 for line in rows if not line.startswith("no room"))


def test_160_columns_show_everything_in_one_line_each() -> None:
    out = on_terminal(comparison_of("BF16", LONG), 160)
    (line,) = (line for line in out.splitlines() if line.startswith(LONG))
    for text in ("4.125", "16.000", "5.123", "4,321.1234", "0.123", "155,055", "+1.01 ± 0.20 %", "ok"):
        assert text in line
    assert "no room for" not in out


def test_a_pipe_gets_every_column_uncut() -> None:
    labels = ["BF16", "x" * 200]
    out = on_terminal(comparison_of(*labels), 80, is_terminal=False)
    (line,) = (line for line in out.splitlines() if line.startswith(labels[1]))
    assert line.split()[1:] == [
        "4.125",
        "16.000",
        "5.123",
        "4,321.1234",
        "0.123",
        "155,055",
        *"+1.01 ± 0.20 %".split(),
        "ok",
    ]


def test_terminal_shows_foreign_text_and_does_not_obey_it() -> None:
    records = [
        record("BF16 " + EVIL, notes=["note " + EVIL]),
        record("other", against_reference=against("BF16 " + EVIL)),
        failed("bad " + EVIL, "message " + EVIL, "remedy " + EVIL),
    ]
    records = [r.model_copy(update={"comparison": r.comparison | {"dataset": EVIL}}) for r in records]
    for columns in (40, 80, 200):
        out = on_terminal(records, columns)
        assert "\x1b" not in out and "\x9b" not in out and "\u202e" not in out
        assert "\\x1b[2J" in out and "\\u202e" in out and "\\n=1+1" in out


def test_failures_and_notes_stand_below() -> None:
    out = on_terminal([record("a", notes=["read me"]), failed("b [red]:dog:")], 80)
    assert "note 1: read me" in out and "ok, note 1" in out and "failed: oom_load" in out
    assert "b [red]:dog:: CUDA out of memory → use a larger GPU" in out


def test_tokens_per_second_say_what_they_count_where_they_are_shown() -> None:
    records = [record("a"), record("b", tokens_per_second=None)]
    meaning = "tok/s: scored tokens per second of scoring, warm-up left out; – where it was not timed"
    assert meaning in on_terminal(records, 160) and meaning in table.markdown(records)
    assert meaning not in on_terminal([record(LONG), record("b")], 40)


@pytest.mark.parametrize(("windows", "said"), [(1, True), (7, True), (8, False), (200, False)])
def test_too_few_windows_are_said(windows: int, said: bool) -> None:
    records = [record("a", comparison={"windows": windows})]
    assert ("too few windows" in on_terminal(records, 80)) == said
    assert ("too few windows" in table.markdown(records)) == said


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e308, 1e15, 0.0])
@pytest.mark.parametrize(
    "field", ["ppl", "ppl_stderr", "layer_bpw", "head_bpw", "vram_gb", "tokens_per_second"]
)
def test_every_number_can_be_shown(field: str, value: float | None) -> None:
    records = [record("a", **{field: value}), record("b", against_reference=against("a", 1e-9, None))]
    for columns in (80, 200):
        out = on_terminal(records, columns)
        assert max(map(len, out.splitlines())) < 200
    assert "| a |" in table.markdown(records)
    (first, _) = csv.DictReader(table.as_csv(records).splitlines())
    assert first["label"] == "a"
    json.loads(table.as_json(records), parse_constant=pytest.fail)


def test_a_cut_text_has_no_perplexity_per_word() -> None:
    records = [record("a", 12.0, comparison={"unit": "word", "protocol": "lm-eval"})]
    out = on_terminal(records, 80)
    assert "PPL/word" in out and "no perplexity per word" in out and "bits per byte" in out


def markdown_cells(text: str) -> list[list[str]]:
    html = MarkdownIt("commonmark").enable("table").render(text)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in html.split("<tr>")[1:]]


def test_markdown_carries_comparison_failures_and_notes() -> None:
    records = [*comparison_of("A | b", "c"), failed("d"), record("e", notes=["read me"])]
    text = table.markdown(records)
    header, first, second, third, _ = markdown_cells(text)
    assert header[-2:] == ["vs A | b", "status"] and "PPL per token" in header
    assert first[0] == "A | b" and second[header.index("vs A | b")] == "+1.01 ± 0.20 %"
    assert len({len(row) for row in (header, first, second, third)}) == 1
    assert "failed: oom_load" in third[-1]
    assert "CUDA out of memory" in text and "use a larger GPU" in text and "note 1: read me" in text


def test_markdown_of_foreign_text_is_text() -> None:
    labels = ["BF16 " + EVIL, EVIL]
    records = [
        *comparison_of(*labels),
        failed(EVIL, EVIL, EVIL),
        record("n", notes=[EVIL], format=EVIL, comparison={}),
    ]
    records = [r.model_copy(update={"comparison": r.comparison | {"dataset": EVIL}}) for r in records]
    text = table.markdown(records)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<script" not in html and "<a " not in html and "\x1b" not in html
    assert len({len(row) for row in markdown_cells(text)}) == 1 and len(markdown_cells(text)) == 5


def rows_of(records: list[ResultRecord]) -> list[dict[str, Any]]:
    return list(csv.DictReader(table.as_csv(records).splitlines()))


def test_csv_carries_comparison_failures_and_notes() -> None:
    records = [*comparison_of("A", "b"), failed("d"), record("e", notes=["one", "two"])]
    first, second, third, fourth = rows_of(records)
    assert first["reference"] == "" and second["reference"] == "A"
    assert float(second["ln_ratio"]) == 0.01 and float(second["ln_ratio_stderr"]) == 0.002
    assert float(second["ppl_ratio"]) == pytest.approx(math.exp(0.01)) and second["significant"] == "True"
    assert third["error"] == "CUDA out of memory" and third["error_category"] == "oom_load"
    assert third["remedy"] == "use a larger GPU" and fourth["notes"] == "one; two"
    assert float(first["ppl"]) == 1234.5678 and first["layer_bpw"] == "16.0"


@pytest.mark.parametrize("start", list("=+-@\t\r"))
def test_csv_has_no_formula(start: str) -> None:
    text = f"{start}HYPERLINK(1)"
    records = [record(text, notes=[text], format=text), record("b", against_reference=against(text, -0.5))]
    first, second = rows_of([*records, failed("c", text, text)])[:2]
    assert first["label"].startswith("'") and first["notes"].startswith("'")
    assert second["reference"].startswith("'") and second["ln_ratio"] == "-0.5"


def test_a_model_that_is_infinitely_worse_has_a_row() -> None:
    records = [record("a"), record("b", math.inf, against_reference=against("a", 800.0, 5.0))]
    out = on_terminal(records, 160)
    assert "inf" in out and "b" in table.markdown(records) and len(rows_of(records)) == 2


def test_a_row_of_metrics_is_a_column_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Metric("novelty", (), lambda found: None, "nats", "new", 3, "what it means", share=True)
    pair = PairMetric("distance", (), lambda found: Estimate(value=0), "nats", "how far", "far", 2)
    monkeypatch.setattr(table, "METRICS", (*table.METRICS, own))
    monkeypatch.setattr(table, "PAIR_METRICS", (*table.PAIR_METRICS, pair))
    ppl, ratio = Estimate(value=5.0), Estimate(value=0.1)
    apart = AgainstReference(
        label="a", metrics={"ln_ratio": ratio, "distance": Estimate(value=1.5, stderr=0.25)}
    )
    found = {"ppl": ppl, "novelty": Estimate(value=0.125, stderr=0.01)}
    records = [record("a"), record("b", None, metrics=found, against_reference=apart)]
    for text in (on_terminal(records, 200), table.markdown(records)):
        assert "12.500 ± 1.000 %" in text and "1.50 ± 0.25" in text
        assert "new: what it means" in text and "far: how far" in text
    first, second = rows_of(records)
    assert (first["novelty"], second["novelty"], second["novelty_stderr"]) == ("", "0.125", "0.01")
    assert (first["distance"], second["distance"], second["distance_stderr"]) == ("", "1.5", "0.25")
    assert "new" not in on_terminal([record("a")], 200)


@pytest.mark.parametrize("quantized", [True, False, None])
def test_a_quantized_reference_is_said(quantized: bool | None) -> None:
    apart = against("Q8_0").model_copy(update={"quantized": quantized})
    records = [record("Q8_0"), record("Q4_0", against_reference=apart)]
    for text in (on_terminal(records, 160), table.markdown(records)):
        assert ("reference is itself quantized" in text) == bool(quantized)
