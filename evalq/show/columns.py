"""Tables of every command: a list of columns, laid out in the room there is, or written as Markdown.

A column says how to get its text from a row and how dispensable it is. On a terminal that is too narrow,
columns go, the most dispensable first, and a line below names them; where that is not enough, the first
column stands on a line of its own above the others. Its text and every other cell that is shown is whole.
To a pipe or a file a table goes in its full width. All text, headers included, is made safe on the way.

    columns = [Column("model", lambda run: run.model), Column("GiB", lambda run: f"{run.gib:.2f}", MINOR)]
    print_columns(runs, columns, console)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from evalq.show.plain import markdown_cell, plain

Row = TypeVar("Row")

# How dispensable a column is. Columns above MAJOR leave first; those at MAJOR only when even the first column
# on a line of its own does not make enough room; those at ALWAYS never.
ALWAYS, MAJOR, MINOR = 0, 1, 2

# Wider than any table, for consoles whose width means nothing.
UNLIMITED = 1_000_000
_FOLDED_CHARS = 24
_INDENT = 2


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column of a table.

    Args:
        header: its name; a newline in it starts a second line of the header on a terminal.
        text: what a row shows in it, one line; text from elsewhere may be returned as it is.
        priority: ALWAYS, MAJOR, MINOR or more: the larger, the sooner a narrow terminal leaves it out.
        right: numbers stand on the right.
        folds: long sentences go on in the next line of the cell, where room is short.
        style: rich's style of a row's cell.
        long_header: its name in Markdown, where room is not short; "" for the same.
        help: what its numbers mean, for a line under the table; "" where the header says it.
    """

    header: str
    text: Callable[[Row], str]
    priority: int = ALWAYS
    right: bool = False
    folds: bool = False
    style: Callable[[Row], str] = lambda row: ""
    long_header: str = ""
    help: str = ""


def print_columns(
    rows: Sequence[Row], columns: Sequence[Column[Row]], console: Console, header: bool = True
) -> list[Column[Row]]:
    """Print the table, in the terminal's width or, elsewhere, in its own, then what was left out.

    Returns:
        The columns that were shown.
    """
    width = console.width if console.is_terminal else UNLIMITED
    kept, stacked = _layout(rows, columns, console, width)
    if stacked:
        _print_stacked(rows, kept, console)
    else:
        table = _table(rows, kept, header)
        table.width = min(width, _width(table, console))
        console.print(table, crop=False)
    left_out = [column for column in columns if column not in kept]
    if left_out:
        names = ", ".join(" ".join(plain_lines(column.header)) for column in left_out)
        line = f"no room for: {names} (a wider terminal shows all columns, and so does | cat)"
        console.print(Text(line, "dim"), soft_wrap=True)
    return kept


def markdown_table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> str:
    """Every column as a Markdown table, which ends in a newline."""
    lines = [
        [markdown_cell(column.long_header or column.header.replace("\n", " ")) for column in columns],
        ["---:" if column.right else "---" for column in columns],
        *([markdown_cell(column.text(row)) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plain_lines(header: str) -> list[str]:
    """The lines of a header, each safe to show."""
    return [plain(line) for line in header.split("\n")]


def _layout(
    rows: Sequence[Row], columns: Sequence[Column[Row]], console: Console, width: int
) -> tuple[list[Column[Row]], bool]:
    """The columns that fit, and whether the first stands above the others."""
    for kept in _narrower(columns, MAJOR):
        if _width(_table(rows, kept, True, folded=True), console) <= width:
            return kept, False
    kept = list(columns)
    for kept in _narrower(columns, ALWAYS):
        if _width(_table(rows, kept[1:], True, folded=True), console) + _INDENT <= width:
            break
    return kept, len(kept) > 1


def _narrower(columns: Sequence[Column[Row]], least: int) -> Iterator[list[Column[Row]]]:
    """All columns, then ever fewer, down to those whose priority is at most `least`."""
    kept = list(columns)
    yield kept
    while any(column.priority > least for column in kept):
        worst = max(column.priority for column in kept)
        last = max(i for i, column in enumerate(kept) if column.priority == worst)
        kept = kept[:last] + kept[last + 1 :]
        yield kept


def _table(rows: Sequence[Row], columns: Sequence[Column[Row]], header: bool, folded: bool = False) -> Table:
    """Rich's table; `folded`: as narrow as columns that fold may become."""
    table = Table(
        box=SIMPLE_HEAD, header_style="bold", show_header=header, show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in columns:
        table.add_column(
            Text("\n".join(plain_lines(column.header))),
            justify="right" if column.right else "left",
            no_wrap=not column.folds,
            overflow="fold" if column.folds else "crop",
            max_width=_FOLDED_CHARS if folded and column.folds else None,
        )
    for row in rows:
        table.add_row(*(Text(plain(column.text(row)), column.style(row)) for column in columns))
    return table


def _width(table: Table, console: Console) -> int:
    """Characters that a table needs."""
    return Measurement.get(console, console.options.update(width=UNLIMITED), table).maximum


def _print_stacked(rows: Sequence[Row], columns: Sequence[Column[Row]], console: Console) -> None:
    """The first column of each row on a line of its own, the others under it."""
    first, others = columns[0], columns[1:]
    table = _table(rows, others, header=True)
    table.width = _width(table, console)
    lines = console.render_lines(table, console.options.update(width=table.width), new_lines=True)
    titles, cells = lines[: len(lines) - len(rows)], lines[len(lines) - len(rows) :]
    indent = Segment(" " * _INDENT)
    console.print(Text(" ".join(plain_lines(first.header)), "bold"), soft_wrap=True)
    for line in titles:
        console.print(Segments([indent, *line]), end="", crop=False)
    for row, line in zip(rows, cells, strict=True):
        console.print(Text(plain(first.text(row)), first.style(row)), soft_wrap=True)
        console.print(Segments([indent, *line]), end="", crop=False)
