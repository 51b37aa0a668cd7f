"""Tables of what was measured by position in the window: a column a bucket, a row a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from evalq.engine.columns import KLD, KLD_BOUND
from evalq.results.by_position import bucket_name
from evalq.results.estimate import Estimate
from evalq.results.record import AtPosition, ResultRecord
from evalq.results.statistics import exp
from evalq.show.columns import MINOR, Column, markdown_table, print_columns
from evalq.show.console import say
from evalq.show.numbers import NOTHING, change_percent, digits_for, estimate
from evalq.show.plain import markdown_cell

NONE = (
    "by position: no window is longer than 1024 tokens; score longer ones, for example with "
    "--protocol long --eval-len 8192"
)
_MEANING = "{}, by the number of tokens before a token in its window, ± standard error"
_KLD_DIGITS = 5


@dataclass(frozen=True)
class _Table:
    """One quantity.

    Args:
        title: what it is.
        buckets: a record's.
        text: a bucket's cell; "" where it has none.
    """

    title: str
    buckets: Callable[[ResultRecord], Sequence[AtPosition]]
    text: Callable[[AtPosition], str]


def print_positions(
    records: Sequence[ResultRecord], console: Console, kld: bool = False, text: str = ""
) -> None:
    """The tables, each under a line that says what it is.

    Args:
        records: of one comparison.
        console: where to.
        kld: with KL divergence, where it is known.
        text: its name, where there are several.
    """
    found, where = _tables(records, kld), f"{text}: " if text else ""
    if not found:
        say(console, (where + NONE, "dim"))
    for table in found:
        rows = [record for record in records if table.buckets(record)]
        console.print()
        say(console, (where + _MEANING.format(table.title), "dim"))
        console.print()
        print_columns(rows, _columns(table, rows), console)


def markdown_positions(records: Sequence[ResultRecord], kld: bool = False, text: str = "") -> str:
    """The same as Markdown."""
    lines, where = "", f"{text}: " if text else ""
    for table in _tables(records, kld):
        rows = [record for record in records if table.buckets(record)]
        title = markdown_cell(where + _MEANING.format(table.title))
        lines += f"\n{title}:\n\n{markdown_table(rows, _columns(table, rows))}"
    return lines or f"\n{markdown_cell(where + NONE)}.\n"


def _tables(records: Sequence[ResultRecord], kld: bool) -> list[_Table]:
    """Those for which some record has something to show."""
    against = next((r.against_reference.label for r in records if r.against_reference), "")
    found = [
        _Table("perplexity per token", lambda r: r.by_position, partial(_value, name="ppl", digits=4)),
        _Table(f"change of perplexity against {against}", _beside, _change),
    ]
    if kld:
        for name, title in (
            (KLD.name, "mean KL divergence"),
            (KLD_BOUND.name, "lower bound of KL divergence"),
        ):
            text = partial(_value, name=name, digits=_KLD_DIGITS)
            found.append(_Table(f"{title} from {against}, nats per token", _beside, text))
    return [one for one in found if any(one.text(at) for r in records for at in one.buckets(r))]


def _columns(table: _Table, rows: Sequence[ResultRecord]) -> list[Column[ResultRecord]]:
    names = dict.fromkeys(bucket_name(at) for record in rows for at in table.buckets(record))
    return [
        Column[ResultRecord]("model", lambda record: record.label),
        *(Column[ResultRecord](name, partial(_cell, table, name), MINOR, right=True) for name in names),
    ]


def _cell(table: _Table, name: str, record: ResultRecord) -> str:
    return next((table.text(at) for at in table.buckets(record) if bucket_name(at) == name), "") or NOTHING


def _beside(record: ResultRecord) -> Sequence[AtPosition]:
    return () if record.against_reference is None else record.against_reference.by_position


def _value(at: AtPosition, name: str, digits: int) -> str:
    found: Estimate | None = at.metrics.get(name)
    return "" if found is None else estimate(found.value, found.stderr, digits_for(found.value, digits))


def _change(at: AtPosition) -> str:
    found = at.metrics.get("ln_ratio")
    if found is None:
        return ""
    ratio = exp(found.value)
    return change_percent(ratio, None if found.stderr is None else ratio * found.stderr)
