"""Records as a table: on a terminal, as Markdown, as CSV, as JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from evalq.engine.columns import KLD, KLD_BOUND
from evalq.results.by_position import bucket_name
from evalq.results.estimate import Estimate
from evalq.results.metrics import METRICS, Metric
from evalq.results.paired import PAIR_METRICS, PairMetric
from evalq.results.record import BYTE_LN_RATIO, ResultRecord, require_comparable, windows_text
from evalq.results.verdict import verdict
from evalq.show.columns import MAJOR, MINOR, Column, markdown_table, print_columns
from evalq.show.console import say
from evalq.show.floors import floor_lines, mark
from evalq.show.numbers import NOTHING, change_percent, digits_for, estimate, number
from evalq.show.plain import csv_cell, json_text, markdown_cell
from evalq.show.significance import rules, verdict_lines
from evalq.show.speed import csv_speed, csv_speed_names, speed_columns

# compare_q's own keys first, so that its readers find them where they were.
_CSV_FIELDS = (
    "label layer_bpw head_bpw vram_gb ppl ppl_stderr status tokens_scored tokens_per_second load_seconds "
    "disk_gib format bits_per_byte word_ppl top1 tokens_nonfinite peak_memory_gib engine engine_version "
    "protocol key error error_category remedy reference ppl_ratio ln_ratio ln_ratio_stderr significant notes "
    "verdict kld_floor kld_floor_label kv_cache kv_bits kv_bits_k kv_bits_v"
).split()
# Rows of metrics that have a column of their own as the perplexity of the protocol.
_HEADLINES = ("ppl", "word_ppl")
KLD_HEADER = next(row.header for row in PAIR_METRICS if row.name == KLD.name)
# What a pair's columns in CSV are called: what is subtracted.
_PAIR_FIELDS = {"ppl": "ln_ratio", "kld": "kld_difference", "same_top": "same_top_difference"}
_BY_DECADES = (KLD.name, KLD_BOUND.name)
ENOUGH_WINDOWS = 8
_LONGEST_NAME_IN_HEADER = 16


@dataclass(frozen=True)
class Shown:
    """The records of one table, and what its cells refer to.

    Args:
        records: in the order of the table.
        reference: label of the model that the others are compared with, None without comparisons.
        notes: of all records, each once; a record's cell names them by number, from 1.
    """

    records: Sequence[ResultRecord]
    reference: str | None
    notes: list[str]

    def note_numbers(self, record: ResultRecord) -> str:
        """Which notes are a record's."""
        return ", ".join(str(self.notes.index(note) + 1) for note in dict.fromkeys(record.notes))


def shown(records: Sequence[ResultRecord]) -> Shown:
    """What a table of these records refers to. Raises NotComparable."""
    require_comparable(list(records))
    reference = next((r.against_reference.label for r in records if r.against_reference), None)
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    return Shown(records, reference, notes)


def print_table(records: Sequence[ResultRecord], console: Console, kld: bool = False) -> None:
    """A table, then what its columns mean, failures and notes. Raises NotComparable.

    Args:
        records: the rows.
        console: where to.
        kld: with the columns of `--kld`, where they are known.
    """
    table = shown(records)
    say(console, (caption(records), "dim"))
    console.print()
    kept = print_columns(records, columns(table, kld), console)
    console.print()
    for line in explanations(table, kept):
        say(console, (line, "dim"))
    for label, text, style in verdict_lines(records):
        say(console, f"  {label}: ", (text, style))
    for record in records:
        if record.error:
            say(console, (record.label, "red"), f": {record.error.message} → {record.error.remedy}")
    for i, note in enumerate(table.notes, 1):
        say(console, (f"note {i}", "yellow"), f": {note}")


def columns(table: Shown, kld: bool = False) -> list[Column[ResultRecord]]:
    """The columns of a table of results; which of them a narrow terminal shows is their own affair.

    Args:
        table: the records.
        kld: with those of `--kld`.
    """
    short, whole = headers(table.records)
    found = [
        Column[ResultRecord]("model", lambda r: r.label),
        Column[ResultRecord]("bpw", lambda r: number(r.layer_bpw, 3), MAJOR, right=True),
        Column[ResultRecord](
            "head", lambda r: number(r.head_bpw, 3), MINOR + 1, right=True, long_header="head bpw"
        ),
        Column[ResultRecord]("GiB", lambda r: number(r.vram_gb, 3), MINOR, right=True),
        *_cache_columns(table.records),
        Column[ResultRecord](short, lambda r: number(r.headline_ppl, 4), right=True, long_header=whole),
        Column[ResultRecord]("±", stderr_cell, MAJOR, right=True),
        *_speed_columns(table.records),
    ]
    if any(record.bytes_scored for record in table.records):
        meaning = "bytes of the text that a model's windows scored"
        found.append(Column("bytes", _bytes_cell, MINOR + 2, right=True, help=meaning))
    if table.reference is not None:
        fits = len(table.reference) <= _LONGEST_NAME_IN_HEADER
        name = f"vs {table.reference}" if fits else "vs reference"
        change = f"{change_of(table.records)}, ± its standard error"
        meaning = change if fits else f"{change}; the reference is {table.reference}"
        if any(r.against_reference.quantized for r in table.records if r.against_reference):
            meaning += "; the reference is itself quantized"
        found.append(Column(name, change_cell, MAJOR, right=True, help=meaning))
    found += _metric_columns(table.records, kld)
    found += speed_columns(table.records, lambda r: r.speed)
    return [*found, Column("status", lambda r: _status(table, r), MAJOR, style=_status_style)]


def _cache_columns(records: Sequence[ResultRecord]) -> list[Column[ResultRecord]]:
    """Bits of the KV cache, where some model's is not the engine's own."""
    if all(record.kv_cache is None for record in records):
        return []
    return [Column("KV bits", cache_bits, MAJOR, right=True, help=CACHE_HELP)]


CACHE_HELP = "bits per element of the KV cache, scales included; (keys/values) where they differ"


def cache_bits(record: ResultRecord) -> str:
    """Those of a model's KV cache."""
    k, v = record.kv_bits_k, record.kv_bits_v
    apart = f" ({k:g}/{v:g})" if k is not None and v is not None and k != v else ""
    return NOTHING if record.kv_bits is None else f"{record.kv_bits:g}{apart}"


def _speed_columns(records: Sequence[ResultRecord]) -> list[Column[ResultRecord]]:
    """Tokens per second, where some record was timed."""
    if all(record.tokens_per_second is None for record in records):
        return []
    return [
        Column[ResultRecord](
            "tok/s",
            lambda r: number(r.tokens_per_second, 0),
            MINOR + 2,
            right=True,
            help="scored tokens per second of scoring, warm-up left out; "
            f"{NOTHING} where it was not timed with these options, or only together with KL divergence",
        )
    ]


def _metric_columns(records: Sequence[ResultRecord], kld: bool) -> list[Column[ResultRecord]]:
    """A column for every row of metrics that has a header and that some record holds."""
    rows: list[tuple[Metric | PairMetric, Callable[[ResultRecord], Estimate | None]]] = [
        *((row, partial(_own_estimate, name=row.name)) for row in METRICS if row.name not in _HEADLINES),
        *((row, partial(_pair_estimate, name=row.name)) for row in PAIR_METRICS if kld or not row.with_kld),
    ]
    return [
        Column(row.header, _cell_text(row, get, records), _priority(row), right=True, help=row.help)
        for row, get in rows
        if row.header and any(get(record) is not None for record in records)
    ]


def _cell_text(
    row: Metric | PairMetric,
    get: Callable[[ResultRecord], Estimate | None],
    records: Sequence[ResultRecord],
) -> Callable[[ResultRecord], str]:
    """What a record shows of a metric; the mean KLD with a mark where it is at its engine's floor."""
    text = partial(_metric_text, row, get)
    return text if row.name != KLD.name else lambda record: text(record) + mark(record, records)


def _priority(row: Metric | PairMetric) -> int:
    """The KLD that was asked for stays longer than what is always there."""
    return MAJOR if row.name in _BY_DECADES else MINOR


def _own_estimate(record: ResultRecord, name: str) -> Estimate | None:
    return record.metrics.get(name)


def _pair_estimate(record: ResultRecord, name: str) -> Estimate | None:
    return None if record.against_reference is None else record.against_reference.metrics.get(name)


def _metric_text(
    row: Metric | PairMetric, get: Callable[[ResultRecord], Estimate | None], record: ResultRecord
) -> str:
    found = get(record)
    if found is None:
        return ""
    # An 8-bit format's KLD may be a thousandth of a 2-bit one's in the same column.
    digits = digits_for(found.value, row.digits) if row.name in _BY_DECADES else row.digits
    return estimate(found.value, found.stderr, digits, row.share)


def caption(records: Sequence[ResultRecord]) -> str:
    """What was measured, in one line."""
    if not records:
        return "nothing was scored"
    facts = records[0].comparison
    dataset, scored = facts.get("dataset"), facts.get("tokens_scored")
    name = "WikiText-2 raw test" if dataset == "wiki2" else dataset
    if unit(records) == "byte":
        windows = f"windows of {facts.get('eval_len')} tokens of each model's own tokenizer"
        stride = facts.get("eval_stride")
        return f"bits per byte of {name}, protocol {facts.get('protocol')}, {windows}, stride {stride}"
    count = f"{scored:,}" if isinstance(scored, int) else scored
    protocol, stride = facts.get("protocol"), f", stride {facts.get('eval_stride')}"
    if protocol == "chat":
        return f"{name}, protocol chat, {windows_text(facts)}, {count} tokens of the assistant scored"
    return f"{name}, protocol {protocol}, {windows_text(facts)}{stride}, {count} tokens scored"


def explanations(table: Shown, columns: Sequence[Column[ResultRecord]]) -> list[str]:
    """What the columns that are shown mean, and what the numbers cannot bear, a line each."""
    lines = [f"{column.header}: {column.help}" for column in columns if column.help]
    lines += caveats(table.records, any(column.header == KLD_HEADER for column in columns))
    return lines + rules(table.records)


def caveats(records: Sequence[ResultRecord], kld: bool) -> list[str]:
    """What the numbers of one text cannot bear, a line each.

    Args:
        records: of the text.
        kld: whether KL divergences are shown, which the engines' floors bound.
    """
    lines = []
    scored = [record for record in records if record.status == "ok"]
    windows = scored[0].comparison.get("windows") if scored else None
    if isinstance(windows, int) and windows < ENOUGH_WINDOWS:
        lines.append(
            f"too few windows: {windows}, fewer than {ENOUGH_WINDOWS}; standard errors are rough and 95% "
            "intervals wide"
        )
    if any(record.headline_ppl is None for record in scored):
        lines.append(
            f"no perplexity per {unit(scored)}: it needs the text as a whole, and max_tokens cuts it; "
            "bits per byte are in --json and --csv"
        )
    return lines + (floor_lines(records) if kld else [])


def markdown(records: Sequence[ResultRecord], kld: bool = False) -> str:
    """A table for a README, with failures and notes under it. Raises NotComparable."""
    table = shown(records)
    first, *others = columns(table, kld)
    every = [first, Column[ResultRecord]("format", lambda r: r.format or ""), *others]
    text = markdown_table(records, every)
    text += f"\n{markdown_cell(caption(records))}.\n"
    verdicts = (f"{label}: {text}" for label, text, _ in verdict_lines(records))
    lines = [
        *explanations(table, every),
        *verdicts,
        *(f"note {i}: {note}" for i, note in enumerate(table.notes, 1)),
    ]
    failures = [
        f"- **{markdown_cell(record.label)}** failed ({record.error.category}): "
        f"{markdown_cell(record.error.message)}. To do: {markdown_cell(record.error.remedy)}\n"
        for record in records
        if record.error
    ]
    listed = "".join(failures) + "".join(f"- {markdown_cell(line)}\n" for line in lines)
    return text + (f"\n{listed}" if listed else "")


def as_csv(records: Sequence[ResultRecord]) -> str:
    """One line per record, raw numbers; notes joined by "; "."""
    return csv_lines([flat(record) for record in records], last=more_fields(records))


def csv_lines(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = (), last: Sequence[str] = ()) -> str:
    """Rows as CSV: the columns of every record, with more of them before and behind."""
    out = io.StringIO()
    metrics = [*(row.name for row in METRICS), *(row.name for row in PAIR_METRICS)]
    estimates = [field for name in metrics for field in csv_names(name)]
    fields = list(dict.fromkeys([*first, *_CSV_FIELDS, *estimates, *csv_speed_names(), *last]))
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return out.getvalue()


def as_json(records: Sequence[ResultRecord]) -> str:
    """The records as they are, each with its verdict."""
    return json_text([with_verdict(record) for record in records])


def with_verdict(record: ResultRecord) -> dict[str, Any]:
    """A record as JSON has it."""
    return record.model_dump() | {"verdict": _verdict(record)}


def _verdict(record: ResultRecord) -> str | None:
    """In one line, None where there is none."""
    found = verdict(record)
    return None if found is None else found.text


def flat(record: ResultRecord) -> dict[str, Any]:
    """A record as a row of CSV."""
    row = (
        record.model_dump()
        | {"notes": "; ".join(record.notes), "error": ""}
        | plain_metrics(record.metrics)
        | _more(record)
    )
    if record.error is not None:
        error = record.error
        row |= {"error": error.message, "error_category": error.category, "remedy": error.remedy}
    row |= csv_speed(record.speed)
    against = record.against_reference
    if against is not None:
        row |= plain_metrics(against.metrics) | {"reference": against.label}
        row |= {"ppl_ratio": against.ppl_ratio, "significant": against.significant}
        row |= {"verdict": _verdict(record)}
        if against.floor is not None:
            row |= {"kld_floor": against.floor.kld.value, "kld_floor_label": against.floor.label}
    return row


def _plain_pairs(record: ResultRecord) -> dict[str, float | None]:
    """Every other model's two columns of each quantity: the difference to it, and its corrected p-value."""
    found: dict[str, float | None] = {}
    for pair in record.beside_others:
        name = _PAIR_FIELDS[pair.quantity]
        values = {f"{name}[{pair.other}]": pair.difference.value, f"{name}_p[{pair.other}]": pair.p_holm}
        found |= {str(csv_cell(column)): value for column, value in values.items()}
    return found


def plain_metrics(metrics: Mapping[str, Estimate]) -> dict[str, float | None]:
    """Estimates as columns of CSV."""
    found: dict[str, float | None] = {}
    for name, one in metrics.items():
        found |= zip(csv_names(name), (one.value, one.stderr, one.low, one.high), strict=True)
    return found


def csv_names(metric: str) -> tuple[str, str, str, str]:
    """The columns of a metric in CSV: value, standard error, ends of the 95% interval."""
    return metric, f"{metric}_stderr", f"{metric}_low", f"{metric}_high"


def more_fields(records: Sequence[ResultRecord]) -> list[str]:
    """The columns of CSV that only some runs have: by position, of every pair, per byte."""
    return list(dict.fromkeys(field for record in records for field in _more(record)))


def _more(record: ResultRecord) -> dict[str, float | None]:
    return positions_csv(record) | _plain_pairs(record) | _per_byte(record)


def _per_byte(record: ResultRecord) -> dict[str, float | None]:
    """What only a table of bits per byte has."""
    if record.unit != "byte":
        return {}
    against = record.against_reference
    found = plain_metrics({} if against is None else {BYTE_LN_RATIO: against.log_ratio})
    ratio = None if against is None else against.ratio
    return {"bytes_scored": record.bytes_scored, "bits_per_byte_ratio": ratio} | found


def positions_csv(record: ResultRecord) -> dict[str, float | None]:
    """What was measured by position in the window, "ppl_2k_4k" and so on."""
    against = record.against_reference
    found: dict[str, float | None] = {}
    for at in (*record.by_position, *(() if against is None else against.by_position)):
        name = bucket_name(at).replace("-", "_")
        found |= plain_metrics({f"{metric}_{name}": value for metric, value in at.metrics.items()})
    return found


def unit(records: Sequence[ResultRecord]) -> str:
    """What the perplexity of a text is per."""
    return records[0].unit if records else "token"


def headers(records: Sequence[ResultRecord]) -> tuple[str, str]:
    """The header of what stands for a result, and the same in words."""
    if not records:
        return "PPL/token", "PPL per token"
    return records[0].quantity_in_short, records[0].quantity.replace("perplexity", "PPL")


def change_of(records: Sequence[ResultRecord]) -> str:
    """What is compared with the reference."""
    if unit(records) == "byte":
        return "change of bits per byte on the bytes that both scored"
    return "change of perplexity on the same tokens"


def _bytes_cell(record: ResultRecord) -> str:
    return "" if record.bytes_scored is None else f"{record.bytes_scored:,}"


def stderr_cell(record: ResultRecord) -> str:
    """The error of the perplexity itself."""
    if record.headline_stderr is None:
        return ""
    return ("≥" if record.ppl_stderr_is_lower_bound else "") + number(record.headline_stderr, 3)


def change_cell(record: ResultRecord) -> str:
    """Change of perplexity against the reference in percent, with the error of the paired difference."""
    if record.headline_ratio is None:
        return "" if record.error is None else NOTHING
    return change_percent(*record.headline_ratio)


def _status(table: Shown, record: ResultRecord) -> str:
    if record.error:
        return f"failed: {record.error.category}"
    return f"ok, note {table.note_numbers(record)}" if record.notes else "ok"


def _status_style(record: ResultRecord) -> str:
    if record.error:
        return "red"
    return "yellow" if record.notes else "green"
