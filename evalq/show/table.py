"""Records as a table: on a terminal, as Markdown, as CSV, as JSON."""

import csv
import io
import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evalq.results.record import ResultRecord, require_comparable

# compare_q's own keys first, so that its readers find them where they were.
CSV_FIELDS = (
    "label layer_bpw head_bpw vram_gb ppl ppl_stderr status tokens_scored tokens_per_second load_seconds "
    "disk_gib format bits_per_byte word_ppl top1 tokens_nonfinite peak_memory_gib engine engine_version "
    "protocol key"
).split()


def _unit(records: Sequence[ResultRecord]) -> str:
    return records[0].unit if records else "token"


def print_table(records: Sequence[ResultRecord], console: Console) -> None:
    """A table in the terminal's width, then failures and notes. Raises NotComparable."""
    require_comparable(list(records))
    console.print(caption(records), style="dim", highlight=False, soft_wrap=True)
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for name in ("bpw", "head", "GiB", f"PPL/{_unit(records)}", "±", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    reference = next((r.against_reference.label for r in records if r.against_reference), None)
    if reference is not None:
        table.add_column(f"vs {escape(reference)}", justify="right", no_wrap=True)
    table.add_column("status")
    for record in records:
        status = f"[red]failed: {record.error.category}[/]" if record.error else "[green]ok[/]"
        if record.status == "ok" and record.notes:
            status = f"[yellow]ok, note {_note_numbers(record, records)}[/]"
        against = [_against(record)] if reference is not None else []
        table.add_row(escape(record.label), *_cells(record), *against, status)
    console.print(table)
    for record in records:
        if record.error:
            why = f"{escape(record.error.message)} → {escape(record.error.remedy)}"
            console.print(f"[red]{escape(record.label)}[/]: {why}", highlight=False, soft_wrap=True)
    for number, note in enumerate(_notes(records), 1):
        console.print(f"[yellow]note {number}[/]: {escape(note)}", highlight=False, soft_wrap=True)


def caption(records: Sequence[ResultRecord]) -> str:
    """What was measured, in one line."""
    if not records:
        return "nothing was scored"
    facts = records[0].comparison
    name = {"wiki2": "WikiText-2 raw test"}.get(facts["dataset"], facts["dataset"])
    return (
        f"{name}, protocol {facts['protocol']}, {facts['windows']} windows of {facts['eval_len']} tokens, "
        f"stride {facts['eval_stride']}, {facts['tokens_scored']:,} tokens scored"
    )


def markdown(records: Sequence[ResultRecord]) -> str:
    """A table for a README. Raises NotComparable."""
    require_comparable(list(records))
    reference = next((r.against_reference.label for r in records if r.against_reference), "reference")
    lines = [
        f"| model | format | bpw | head bpw | GiB | PPL per {_unit(records)} | ± | tok/s "
        f"| vs {reference} | status |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        label, kind = (str(text).replace("|", "\\|") for text in (record.label, record.format or ""))
        status = "ok" if record.error is None else f"failed: {record.error.category}"
        lines.append(f"| {label} | {kind} | {' | '.join(_cells(record))} | {_against(record)} | {status} |")
    return "\n".join([*lines, "", f"{caption(records)}.", ""])


def as_csv(records: Sequence[ResultRecord]) -> str:
    """One line per record, raw numbers."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*CSV_FIELDS, "error"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = record.model_dump()
        writer.writerow(row | {"error": "" if record.error is None else record.error.message})
    return out.getvalue()


def as_json(records: Sequence[ResultRecord]) -> str:
    """The records as they are."""
    return json.dumps([record.model_dump() for record in records], indent=2, ensure_ascii=False) + "\n"


def _cells(record: ResultRecord) -> list[str]:
    stderr = record.headline_stderr
    return [
        _number(record.layer_bpw, 3),
        _number(record.head_bpw, 3),
        _number(record.vram_gb, 3),
        _number(record.headline_ppl, 4),
        "" if stderr is None else ("≥" if record.ppl_stderr_is_lower_bound else "") + _number(stderr, 3),
        _number(record.tokens_per_second, 0),
    ]


def _against(record: ResultRecord) -> str:
    """Change of perplexity against the reference in percent, with the error of the paired difference."""
    if record.headline_ratio is None:
        return "" if record.error is None else "–"
    ratio, stderr = record.headline_ratio
    change = f"{100 * (ratio - 1):+.2f}"
    return f"{change} %" if stderr is None else f"{change} ± {100 * stderr:.2f} %"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _notes(records: Sequence[ResultRecord]) -> list[str]:
    return list(dict.fromkeys(note for record in records for note in record.notes))


def _note_numbers(record: ResultRecord, records: Sequence[ResultRecord]) -> str:
    numbered = _notes(records)
    return ", ".join(str(numbered.index(note) + 1) for note in record.notes)
