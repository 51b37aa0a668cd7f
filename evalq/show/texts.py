"""Several texts side by side: a row a model, columns for each text, and the mean of the ratios.

On a terminal, as Markdown, as CSV and as JSON; the table of one text is `evalq.show.table`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from textwrap import wrap
from typing import Any

from rich.console import Console

from evalq.engine.columns import KLD, KLD_BOUND
from evalq.results.estimate import Estimate
from evalq.results.floor import at_floor
from evalq.results.means import MeanOverTexts, mean_over_texts
from evalq.results.record import ResultRecord
from evalq.results.statistics import exp
from evalq.results.texts import ByText
from evalq.results.verdict import verdict, verdict_on_change
from evalq.show import table
from evalq.show.columns import MAJOR, MINOR, Column, markdown_table, print_columns
from evalq.show.console import say
from evalq.show.floors import MARK
from evalq.show.numbers import NOTHING, digits_for, estimate, number
from evalq.show.plain import json_text, markdown_cell
from evalq.show.significance import STYLES, rules
from evalq.show.speed import speed_columns

MEAN = "mean ratio"
_KLD_DIGITS = 5
_NAME_CHARACTERS = 9  # as wide as what stands over it, PPL/token


@dataclass(frozen=True)
class _Row:
    """A model.

    Args:
        records: one a text.
        mean: over them.
    """

    records: tuple[ResultRecord, ...]
    mean: MeanOverTexts

    @property
    def label(self) -> str:
        return self.records[0].label

    def known(self, name: str) -> Any:
        """What is the same on every text, from the first record that has it; None where none has."""
        return next((v for v in (getattr(r, name) for r in self.records) if v is not None), None)


@dataclass(frozen=True)
class TextsTable:
    """What a table of several texts shows.

    Args:
        found: the records.
        kld: with the columns of `--kld`, where they are known.
    """

    found: ByText
    kld: bool = False

    @cached_property
    def rows(self) -> list[_Row]:
        """The models, in their order."""
        return [_Row(records, mean_over_texts(records, self.found.names)) for records in self.found.models]

    @cached_property
    def means(self) -> list[MeanOverTexts]:
        """Of every model."""
        return [row.mean for row in self.rows]

    @cached_property
    def reference(self) -> str | None:
        """Label of the model that the ratios are to; None without, or where it is not one for all texts."""
        labels = {r.against_reference.label for row in self.rows for r in row.records if r.against_reference}
        return labels.pop() if len(labels) == 1 else None

    @cached_property
    def notes(self) -> list[str]:
        """Of all models, each once; a row's cell names them by number, from 1."""
        return list(dict.fromkeys(note for row in self.rows for note in self.notes_of(row)))

    def notes_of(self, row: _Row) -> list[str]:
        """A model's notes; one that is not on all of its texts names its text."""
        lists = [record.notes for record in row.records if record.status == "ok"]
        shared = set(lists[0]).intersection(*lists) if lists else set()
        return list(
            dict.fromkeys(
                note if note in shared else f"{name}: {note}"
                for name, record in zip(self.found.names, row.records, strict=True)
                for note in record.notes
            )
        )


def print_texts(shown: TextsTable, console: Console) -> None:
    """A table, then what its columns mean, verdicts, failures and notes."""
    for line in _captions(shown):
        say(console, (line, "dim"))
    console.print()
    kept = print_columns(shown.rows, columns(shown), console)
    console.print()
    for line in _explanations(shown, kept):
        say(console, (line, "dim"))
    for label, text, style in verdict_lines(shown):
        say(console, f"  {label}: ", (text, style))
    for where, record in _failures(shown):
        assert record.error is not None
        say(console, (where, "red"), f": {record.error.message} → {record.error.remedy}")
    for i, note in enumerate(shown.notes, 1):
        say(console, (f"note {i}", "yellow"), f": {note}")


def columns(shown: TextsTable) -> list[Column[_Row]]:
    """The columns; a narrow terminal leaves out the own errors and comparisons first, then perplexities."""
    found = [
        Column[_Row]("model", lambda row: row.label),
        Column[_Row]("bpw", lambda row: number(row.known("layer_bpw"), 3), MAJOR, right=True),
        Column[_Row]("GiB", lambda row: number(row.known("vram_gb"), 3), MINOR, right=True),
    ]
    if any(row.known("kv_cache") for row in shown.rows):
        found.append(Column("KV bits", _cache_bits, MAJOR, right=True, help=table.CACHE_HELP))
    for i, name in enumerate(shown.found.names):
        short, whole = table.headers(shown.found.texts[name])
        found += [
            _column(i, f"{short}\n{_lines(name)}", _ppl, MAJOR, f"{whole}, {name}"),
            _column(i, f"±\n{_lines(name)}", _stderr, MINOR + 2, f"± {name}"),
        ]
        if any(row.records[i].against_reference for row in shown.rows):
            header = f"change\n{_lines(name)}"
            found.append(_column(i, header, table.change_cell, MINOR + 1, f"change, {name}"))
    found += _mean_column(shown)
    if shown.kld:
        found += _kld_columns(shown)
    found += speed_columns(shown.rows, lambda row: row.known("speed"))
    return [*found, Column("status", partial(_status, shown), MAJOR, style=_status_style)]


def _lines(name: str) -> str:
    """A text's name in a header, in lines where that makes the column narrower."""
    return "\n".join(wrap(name, _NAME_CHARACTERS, break_long_words=False, break_on_hyphens=False)) or name


def _column(
    i: int, header: str, text: Callable[[ResultRecord], str], priority: int, long_header: str
) -> Column[_Row]:
    """A column of the i-th text."""
    return Column(header, lambda row: text(row.records[i]), priority, right=True, long_header=long_header)


def _mean_column(shown: TextsTable) -> list[Column[_Row]]:
    if not any(mean.ln_ratio for mean in shown.means):
        return []
    reference = shown.reference or "the reference"
    meaning = (
        f"geometric mean over {len(shown.found.names)} texts, each alike, of {_averaged(shown)} / that of "
        f"{reference}, ± its standard error"
    )
    if any(r.against_reference.quantized for row in shown.rows for r in row.records if r.against_reference):
        meaning += "; the reference is itself quantized"
    return [Column[_Row](MEAN, lambda row: _ratio(row.mean), right=True, help=meaning)]


def _averaged(shown: TextsTable) -> str:
    """Whose ratios the mean is of: those per token also where the headline is per word."""
    return "bits per byte" if shown.rows[0].records[0].unit == "byte" else "PPL per token"


def _kld_columns(shown: TextsTable) -> list[Column[_Row]]:
    """The mean KLD, then KLD or its lower bound on each text that some model has it on."""
    found = []
    if any(mean.kld for mean in shown.means):
        meaning = f"mean of the KLD on {len(shown.found.names)} texts, each alike, nats per token"
        mean = Column[_Row]("KLD\nmean", lambda row: _mean_kld(row.mean), MAJOR, right=True, help=meaning)
        found.append(mean)
    for metric, header in ((KLD.name, table.KLD_HEADER), (KLD_BOUND.name, "KLD bound")):
        for i, name in enumerate(shown.found.names):
            of_text = shown.found.texts[name]
            if any(_paired(record, metric) for record in of_text):
                text = partial(_kld, metric, of_text)
                found.append(_column(i, f"{header}\n{_lines(name)}", text, MAJOR, f"{header}, {name}"))
    return found


def _paired(record: ResultRecord, metric: str) -> Estimate | None:
    return None if record.against_reference is None else record.against_reference.metrics.get(metric)


def _kld(metric: str, of_text: Sequence[ResultRecord], record: ResultRecord) -> str:
    found = _paired(record, metric)
    if found is None:
        return "" if record.error is None else NOTHING
    mark = f" {MARK}" if metric == KLD.name and at_floor(record, of_text) else ""
    return _nats(found) + mark


def _mean_kld(mean: MeanOverTexts) -> str:
    return "" if mean.kld is None else _nats(mean.kld)


def _nats(found: Estimate) -> str:
    return estimate(found.value, found.stderr, digits_for(found.value, _KLD_DIGITS))


def _cache_bits(row: _Row) -> str:
    """Of a record that was scored: one that failed may not know what its engine takes."""
    return table.cache_bits(next((r for r in row.records if r.kv_bits is not None), row.records[0]))


def _ppl(record: ResultRecord) -> str:
    return "failed" if record.error else number(record.headline_ppl, 4)


def _stderr(record: ResultRecord) -> str:
    return NOTHING if record.error else table.stderr_cell(record)


def _ratio(mean: MeanOverTexts) -> str:
    if mean.ratio is None:
        return NOTHING if mean.why_not else ""
    return estimate(mean.ratio.value, mean.ratio.stderr, 4)


def _status(shown: TextsTable, row: _Row) -> str:
    failed = [name for name, r in zip(shown.found.names, row.records, strict=True) if r.error]
    if failed:
        return "failed" if len(failed) == len(row.records) else f"failed on {', '.join(failed)}"
    numbers = ", ".join(map(str, sorted(shown.notes.index(note) + 1 for note in shown.notes_of(row))))
    return f"ok, note {numbers}" if numbers else "ok"


def _status_style(row: _Row) -> str:
    if any(record.error for record in row.records):
        return "red"
    return "yellow" if any(record.notes for record in row.records) else "green"


def _captions(shown: TextsTable) -> list[str]:
    """What was measured, a line a text."""
    return [f"{name}: {table.caption(records)}" for name, records in shown.found.texts.items()]


def _explanations(shown: TextsTable, kept: Sequence[Column[_Row]]) -> list[str]:
    """What the columns that are shown mean, and what the numbers cannot bear, a line each."""
    lines = [f"{column.header.replace(chr(10), ' ')}: {column.help}" for column in kept if column.help]
    headers = [column.header.split("\n")[0] for column in kept]
    if "change" in headers:
        reference = shown.reference or "the text's reference"
        change = table.change_of(shown.rows[0].records).removeprefix("change of ")
        lines.append(f"change: of {change}, against {reference}, ± its standard error")
    lines += _caveats(shown, table.KLD_HEADER in headers)
    lines += [f"no mean for {mean.label}: {mean.why_not}" for mean in shown.means if mean.why_not]
    return lines + rules([record for row in shown.rows for record in row.records])


def _caveats(shown: TextsTable, kld: bool) -> list[str]:
    """What the numbers of each text cannot bear; the name of the text goes before what is not so of all."""
    names_of: dict[str, list[str]] = {}
    for name, records in shown.found.texts.items():
        for line in table.caveats(records, kld):
            names_of.setdefault(line, []).append(name)
    n_texts = len(shown.found.names)
    return [
        line if len(names) == n_texts else f"{', '.join(names)}: {line}" for line, names in names_of.items()
    ]


def verdict_lines(shown: TextsTable) -> list[tuple[str, str, str]]:
    """Label, verdict and rich's style of each model: of the mean, and of texts where they differ."""
    return [line for row in shown.rows if (line := _verdict_line(row, shown.found.names)) is not None]


def _verdict_line(row: _Row, names: Sequence[str]) -> tuple[str, str, str] | None:
    of_texts: dict[str, list[str]] = {}
    for name, record in zip(names, row.records, strict=True):
        one = verdict(record)
        if one is not None:
            of_texts.setdefault(one.kind, []).append(name)
    if not of_texts:
        return None
    each = "; ".join(f"{kind} on {', '.join(on)}" for kind, on in of_texts.items())
    worst = next((kind for kind in STYLES if kind in of_texts), "")
    if row.mean.ln_ratio is None:
        return row.label, each, STYLES.get(worst, "")
    over_all = verdict_on_change(_change(row.mean))
    alike = list(of_texts) == [over_all.kind]
    text = f"{over_all.text} in the mean; " + (f"{over_all.kind} on every text" if alike else each)
    return row.label, text, STYLES.get("broken" if worst == "broken" else over_all.kind, "")


def _change(mean: MeanOverTexts) -> tuple[float, float] | None:
    """The 95% interval of the mean ratio, minus 1."""
    ends = None if mean.ln_ratio is None else mean.ln_ratio.interval
    return None if ends is None else (exp(ends[0]) - 1, exp(ends[1]) - 1)


def _failures(shown: TextsTable) -> Iterator[tuple[str, ResultRecord]]:
    """Each failure with its model and text; one that is the same on every text once."""
    for row in shown.rows:
        failed = [(n, r) for n, r in zip(shown.found.names, row.records, strict=True) if r.error]
        same = len({repr(record.error) for _, record in failed}) == 1 and len(failed) == len(row.records)
        for name, record in failed[:1] if same else failed:
            yield row.label if same else f"{row.label}, {name}", record


def markdown(shown: TextsTable) -> str:
    """A table for a README, with everything else under it."""
    first, *others = columns(shown)
    every = [first, Column[_Row]("format", lambda row: row.records[0].format or ""), *others]
    text = markdown_table(shown.rows, every)
    lines = [
        *_captions(shown),
        *_explanations(shown, every),
        *(f"{label}: {said}" for label, said, _ in verdict_lines(shown)),
        *(f"note {i}: {note}" for i, note in enumerate(shown.notes, 1)),
    ]
    for where, record in _failures(shown):
        assert record.error is not None
        text += f"\n- **{markdown_cell(where)}** failed ({record.error.category}): "
        text += f"{markdown_cell(record.error.message)}. To do: {markdown_cell(record.error.remedy)}"
    return text + "\n" + "".join(f"- {markdown_cell(line)}\n" for line in lines)


def as_csv(shown: TextsTable) -> str:
    """A line per model and text: the columns of one text, its name, and the model's means on each line."""
    names = ("mean_ratio", "mean_ln_ratio", "mean_kld")
    last = ["texts", *(field for name in names for field in table.csv_names(name)), "no_mean"]
    last += table.more_fields([record for row in shown.rows for record in row.records])
    rows = [
        {"dataset": name} | table.flat(record) | {"texts": len(row.records)} | _plain_means(row.mean)
        for row in shown.rows
        for name, record in zip(shown.found.names, row.records, strict=True)
    ]
    return table.csv_lines(rows, ["label", "dataset"], last)


def _plain_means(mean: MeanOverTexts) -> dict[str, Any]:
    figures = {"mean_ratio": mean.ratio, "mean_ln_ratio": mean.ln_ratio, "mean_kld": mean.kld}
    known = {name: figure for name, figure in figures.items() if figure is not None}
    return {**table.plain_metrics(known), "no_mean": mean.why_not}


def as_json(shown: TextsTable) -> str:
    """An object: the texts' names, the records with the name of their text, and each model's means."""
    records = [
        table.with_verdict(record) | {"text": name}
        for row in shown.rows
        for name, record in zip(shown.found.names, row.records, strict=True)
    ]
    means = [
        {
            "label": mean.label,
            "reference": shown.reference,
            "ratio": None if mean.ratio is None else mean.ratio.model_dump(),
            "ln_ratio": None if mean.ln_ratio is None else mean.ln_ratio.model_dump(),
            "kld": None if mean.kld is None else mean.kld.model_dump(),
            "verdict": None if mean.ln_ratio is None else verdict_on_change(_change(mean)).text,
            "no_mean": mean.why_not or None,
        }
        for mean in shown.means
    ]
    return json_text({"texts": list(shown.found.names), "records": records, "means": means})
