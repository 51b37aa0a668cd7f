"""Tables of several texts: on terminals, as Markdown, as CSV, as JSON."""

import csv
import json

import pytest
from result_records import COMPARISON, failed, record, terminal
from rich.cells import cell_len

from evalq.results.estimate import Estimate
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.texts import by_text
from evalq.show.texts import TextsTable, as_csv, as_json, markdown, print_texts

TEXTS = ("wiki2", "code", "chat")
EVIL = "\x1b[2J<script>|\n=1+1\u202e"


def model(
    label: str, ratios: tuple[float | None, ...], klds: tuple[float, ...] = (), **more: object
) -> list[ResultRecord]:
    """A model on the three texts; without ratios, the reference."""
    found = []
    for i, (text, ratio) in enumerate(zip(TEXTS, ratios, strict=True)):
        against = None
        if ratio is not None:
            metrics = {"ln_ratio": Estimate(value=ratio, stderr=0.002, low=ratio - 0.004, high=ratio + 0.004)}
            if klds:
                kld = klds[i]
                metrics["kld"] = Estimate(value=kld, stderr=kld / 20, low=0.9 * kld, high=1.1 * kld)
            against = AgainstReference(label="BF16", quantized=False, metrics=metrics)
        found.append(
            record(
                label,
                17.1234 - i,
                comparison={"dataset": text},
                against_reference=against,
                is_reference=ratio is None,
                **more,
            )
        )
    return found


def fails_on(records: list[ResultRecord], text: str) -> list[ResultRecord]:
    bad = failed(records[0].label)
    return [
        bad.model_copy(update={"comparison": COMPARISON | {"dataset": text}})
        if one.comparison["dataset"] == text
        else one
        for one in records
    ]


def shown(*models: list[ResultRecord], kld: bool = False) -> TextsTable:
    found = by_text([one for records in models for one in records])
    assert found is not None
    return TextsTable(found, kld)


def on_terminal(found: TextsTable, columns: int, is_terminal: bool = True) -> str:
    return terminal(lambda console: print_texts(found, console), columns, is_terminal)


REFERENCE = model("BF16", (None, None, None), layer_bpw=16.0)
INT4 = model("INT4 g128", (0.03, 0.05, 0.001), (0.02, 0.03, 0.01))
EXL3 = model("EXL3 4.0", (0.01, 0.02, 0.03), (0.002, 0.003, 0.001))


@pytest.mark.parametrize("kld", [False, True])
def test_80_columns_show_every_perplexity_and_the_mean_whole(kld: bool) -> None:
    out = on_terminal(shown(REFERENCE, INT4, EXL3, kld=kld), 80)
    # (0.03 + 0.05 + 0.001) / 3 = 0.027
    for text in ("17.1234", "16.1234", "15.1234", "1.0274 ± 0.0012", "1.0202 ± 0.0012", "wiki2", "code"):
        assert text in out, text
    assert ("0.02000 ± 0.00062" in out) == kld
    rows = out.partition("─\n")[2].partition("\n\n")[0].splitlines()
    assert all(cell_len(line) <= 80 for line in rows if not line.startswith("no room"))


def test_a_pipe_gets_every_column_of_every_text() -> None:
    out = on_terminal(shown(REFERENCE, INT4, kld=True), 80, is_terminal=False)
    (line,) = (line for line in out.splitlines() if line.startswith("INT4 g128  "))
    for text in ("4.125", "5.123", "0.123", "+3.05 ± 0.21 %", "+0.10 ± 0.20 %", "0.01000 ± 0.00050", "ok"):
        assert text in line
    assert "no room for" not in out


def test_what_each_text_is_stands_above_the_table() -> None:
    out = on_terminal(shown(REFERENCE, INT4), 160)
    assert "wiki2: WikiText-2 raw test, protocol exllamav3, 20 windows" in out and "\nchat: chat, " in out


def test_verdicts_are_of_the_mean_and_of_texts_where_they_differ() -> None:
    out = on_terminal(shown(REFERENCE, INT4, EXL3), 160)
    # 0.027 with an error of 0.002 / sqrt(3) and an interval of 1.97 of them to both sides.
    assert "INT4 g128: worse by 2.50 to 2.97 % in the mean; worse on wiki2, code; no difference" in out
    assert "EXL3 4.0: worse by 1.79 to 2.25 % in the mean; worse on every text" in out


def test_a_text_that_failed_leaves_no_mean_and_says_why() -> None:
    out = on_terminal(shown(REFERENCE, fails_on(INT4, "chat"), EXL3), 160)
    (line,) = (line for line in out.splitlines() if line.startswith("INT4 g128  "))
    assert " failed " in line and " – " in line and line.rstrip().endswith("failed on chat")
    assert "no mean for INT4 g128: it failed on chat" in out
    assert "INT4 g128, chat: CUDA out of memory → use a larger GPU" in out
    assert "1.0202 ± 0.0012" in out, "the other model has its mean"


def test_a_failure_on_every_text_is_told_once() -> None:
    bad = INT4
    for text in TEXTS:
        bad = fails_on(bad, text)
    out = on_terminal(shown(REFERENCE, EXL3, bad), 160)
    assert out.count("CUDA out of memory") == 1 and "INT4 g128: CUDA out of memory" in out


def test_notes_name_their_text_unless_they_are_on_all() -> None:
    noted = [one.model_copy(update={"notes": ["everywhere"]}) for one in INT4]
    noted[1] = noted[1].model_copy(update={"notes": ["everywhere", "here"]})
    out = on_terminal(shown(REFERENCE, noted), 160)
    assert "note 1: everywhere" in out and "note 2: code: here" in out and "ok, note 1, 2" in out


def test_caveats_of_one_text_name_it_and_those_of_all_do_not() -> None:
    few = [
        one.model_copy(update={"comparison": one.comparison | {"windows": 3}})
        if one.comparison["dataset"] == "code"
        else one
        for one in [*REFERENCE, *INT4]
    ]
    found = by_text(few)
    assert found is not None
    assert "\ncode: too few windows: 3" in on_terminal(TextsTable(found), 160)
    assert "\nfloor of fake is unknown" in on_terminal(shown(REFERENCE, INT4, kld=True), 300)


def test_json_holds_the_records_with_their_text_and_the_means() -> None:
    found = json.loads(as_json(shown(REFERENCE, INT4, fails_on(EXL3, "code"))))
    assert found["texts"] == list(TEXTS)
    assert [(r["label"], r["text"]) for r in found["records"][:4]] == [
        *(("BF16", text) for text in TEXTS),
        ("INT4 g128", "wiki2"),
    ]
    assert all(ResultRecord.model_validate(one) for one in found["records"])
    reference, int4, exl3 = found["means"]
    assert reference["ratio"] is None and reference["no_mean"] is None
    assert int4["ratio"]["value"] == pytest.approx(2.718281828459045**0.027)
    assert int4["kld"]["value"] == pytest.approx(0.02) and int4["verdict"].startswith("worse by 2.50")
    assert exl3["ratio"] is None and exl3["no_mean"] == "it failed on code"


def test_csv_has_a_line_for_each_model_and_text() -> None:
    lines = list(csv.DictReader(as_csv(shown(REFERENCE, INT4, fails_on(EXL3, "code"))).splitlines()))
    assert [(line["label"], line["dataset"]) for line in lines[3:6]] == [("INT4 g128", t) for t in TEXTS]
    assert {line["mean_ratio"] for line in lines[3:6]} == {lines[3]["mean_ratio"]}
    assert float(lines[3]["mean_ln_ratio"]) == pytest.approx(0.027) and lines[3]["texts"] == "3"
    assert float(lines[4]["ln_ratio"]) == 0.05 and float(lines[4]["mean_kld"]) == pytest.approx(0.02)
    assert lines[6]["mean_ratio"] == "" and lines[6]["no_mean"] == "it failed on code"
    assert lines[7]["status"] == "failed" and lines[7]["error"]


def test_markdown_is_the_table_and_foreign_text_stays_text() -> None:
    evil = [one.model_copy(update={"label": EVIL, "notes": [EVIL]}) for one in INT4]
    found = shown(REFERENCE, evil, fails_on(EXL3, "chat"), kld=True)
    text = markdown(found)
    header, rule, *rows = text.partition("\n\n")[0].splitlines()
    assert len(rows) == 3 and "PPL per token, code" in header and "KLD mean" in header
    assert len({line.replace("\\|", "").count("|") for line in (header, rule, *rows)}) == 1
    assert "\x1b" not in text and "<script" not in text
    assert "**EXL3 4.0, chat** failed (oom_load)" in text
    for columns in (40, 80, 200):
        out = on_terminal(found, columns)
        assert "\x1b" not in out and "\u202e" not in out
