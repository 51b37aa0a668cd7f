"""Verdicts, matrices of all pairs, and windows for a wanted resolution, on a terminal and as Markdown."""

from collections.abc import Iterator, Sequence
from functools import partial

from rich.console import Console

from evalq.results.record import ResultRecord
from evalq.results.resolution import Resolution
from evalq.results.significance import Difference, Matrix
from evalq.results.statistics import exp
from evalq.results.verdict import BROKEN_RULE, verdict
from evalq.show.columns import MAJOR, Column, print_columns
from evalq.show.console import say
from evalq.show.numbers import NOTHING, number

# The most serious kind first.
STYLES = {"broken": "red", "worse": "yellow", "better": "green"}
_WORDS = {
    "ppl": "change of perplexity per token, row against column, in percent",
    "kld": "mean KLD of the row minus that of the column, in nats per token",
    "same_top": "same-top of the row minus that of the column, in percentage points (McNemar, clustered)",
}
_TURN = {"ppl": "positive is worse", "kld": "positive is worse", "same_top": "negative is worse"}


def verdict_lines(records: Sequence[ResultRecord]) -> list[tuple[str, str, str]]:
    """Label, verdict and rich's style of each model that has a verdict."""
    found = ((record.label, verdict(record)) for record in records)
    return [(label, one.text, STYLES.get(one.kind, "")) for label, one in found if one is not None]


def rules(records: Sequence[ResultRecord]) -> list[str]:
    """What the verdicts mean, a line each; none without verdicts."""
    kinds = {one.kind for one in map(verdict, records) if one is not None}
    what = (
        "bits per byte on the bytes that both scored"
        if any(record.unit == "byte" for record in records)
        else "perplexity on the same tokens"
    )
    lines = [f"verdicts are by the 95% interval of the change of {what}"] if kinds else []
    return lines + ([BROKEN_RULE] if "broken" in kinds else [])


def print_matrices(matrices: Sequence[Matrix], console: Console) -> None:
    """A table for each quantity; a star marks pairs that differ. With nothing to compare, a line says so."""
    for matrix in matrices:
        say(console, (f"{_WORDS[matrix.quantity]}; {_TURN[matrix.quantity]}", "dim"))
        console.print()
        numbered = list(enumerate(matrix.labels, 1))
        columns = [Column[tuple[int, str]]("model", lambda row: f"{row[0]} {row[1]}")]
        columns += [Column(str(i), partial(_cell, matrix, label), MAJOR, right=True) for i, label in numbered]
        print_columns(numbered, columns, console)
        console.print()
    if matrices:
        n_pairs = len(matrices[0].differences)
        pairs = "1 pair" if n_pairs == 1 else f"{n_pairs} pairs"
        say(console, (f"*: they differ, at 5% for all {pairs} together (t test, clustered, Holm)", "dim"))
    else:
        say(console, ("nothing to compare: fewer than two models were scored", "dim"))


def _cell(matrix: Matrix, column: str, row: tuple[int, str]) -> str:
    found = matrix.between(row[1], column)
    if found is None:
        return "·" if row[1] == column else NOTHING
    return _value(matrix.quantity, found) + ("*" if found.shown else " ")


def _value(quantity: str, found: Difference) -> str:
    value = found.estimate.value
    if quantity == "kld":
        return _signed(value, 4)
    return _signed(100 * (exp(value) - 1 if quantity == "ppl" else value), 2)


def _signed(value: float, digits: int) -> str:
    return ("+" if value > 0 else "") + number(value, digits)


def resolution_lines(found: Sequence[tuple[str, Resolution | None]]) -> Iterator[str]:
    """How many windows each model takes, a line each.

    Args:
        found: label and what its windows resolve, None where one window tells nothing.
    """
    for label, one in found:
        if one is None:
            yield f"{label}: the windows tell no error yet, two that do not overlap are needed"
            continue
        wanted, now = (f"± {100 * half:.3g} %" for half in (one.wanted, one.half_width))
        if one.windows_needed is None:
            yield f"{label}: {wanted} takes more windows than any text has; {one.windows} windows give {now}"
            continue
        enough = " (there already)" if one.windows_needed <= one.windows else ""
        yield (
            f"{label}: {wanted} takes about {one.windows_needed:,} windows{enough}; "
            f"{one.windows} windows give {now}"
        )
