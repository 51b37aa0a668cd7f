"""Tables of every command: a list of columns, laid out in the room there is, or written as Markdown.

A column says how to get its text from a row and how dispensable it is. On a terminal that is too narrow,
columns go, the most dispensable first, and a line below names them; where that is not enough, the first
column stands on a line of its own above the others. Its text and every other cell that is shown is whole.
To a pipe or a file a table goes in its full width. All text, headers included, is made safe on the way.

    columns = [Column("model", lambda run: run.model), Column("GiB", lambda run: f"{run.gib:.2f}", MINOR)]
    print_columns(runs, columns, console)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from evalq.show.plain import markdown_cell, plain

Row = TypeVar("Row")

# How dispensable a column is. Columns above MAJOR leave first; those at MAJOR only when even the first column
# on a line of its own does not make enough room; those at ALWAYS never.
ALWAYS, MAJOR, MINOR = 0, 1, 2

_FOLDED_CHARS = 24
_INDENT = _GAP = 2


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
    filled = [_fill(column, rows) for column in columns]
    room = console.width if console.is_terminal else math.inf
    kept, stacked = _layout(filled, room)
    if stacked:
        _print_stacked(kept, console)
    else:
        table = _table(kept, header)
        table.width = int(min(room, _width([one.width for one in kept])))
        console.print(table, crop=False)
    left_out = [" ".join(one.header) for one in filled if one not in kept]
    if left_out:
        line = f"no room for: {', '.join(left_out)} (a wider terminal shows all columns, and so does | cat)"
        console.print(Text(line, "dim"), soft_wrap=True)
    return [one.column for one in kept]


def markdown_table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> str:
    """Every column as a Markdown table, which ends in a newline."""
    lines = [
        [markdown_cell(column.long_header or column.header.replace("\n", " ")) for column in columns],
        ["---:" if column.right else "---" for column in columns],
        *([markdown_cell(column.text(row)) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@dataclass(frozen=True)
class _Filled(Generic[Row]):
    """A column with its texts, safe to show.

    Args:
        column: as declared.
        header: its lines.
        cells: one per row.
        width: characters of the widest.
    """

    column: Column[Row]
    header: list[str]
    cells: list[Text]
    width: int

    @property
    def least_width(self) -> int:
        """How narrow it may become."""
        return min(self.width, _FOLDED_CHARS) if self.column.folds else self.width


def _fill(column: Column[Row], rows: Sequence[Row]) -> _Filled[Row]:
    header = [plain(line) for line in column.header.split("\n")]
    cells = [Text(plain(column.text(row)), column.style(row)) for row in rows]
    widest = max(map(cell_len, header))
    return _Filled(column, header, cells, max([widest, *(cell.cell_len for cell in cells)]))


def _width(widths: Sequence[int]) -> int:
    """Characters of a table with columns of these widths."""
    return sum(widths) + _GAP * max(0, len(widths) - 1)


def _layout(columns: list[_Filled[Row]], room: float) -> tuple[list[_Filled[Row]], bool]:
    """The columns that fit, and whether the first stands above the others."""
    for kept in _narrower(columns, MAJOR):
        if _width([one.least_width for one in kept]) <= room:
            return kept, False
    kept = columns
    for kept in _narrower(columns, ALWAYS):
        if _INDENT + _width([one.least_width for one in kept[1:]]) <= room:
            break
    return kept, len(kept) > 1


def _narrower(columns: list[_Filled[Row]], least: int) -> Iterator[list[_Filled[Row]]]:
    """All columns, then ever fewer, down to those whose priority is at most `least`."""
    kept = columns
    yield kept
    while any(one.column.priority > least for one in kept):
        worst = max(one.column.priority for one in kept)
        last = max(i for i, one in enumerate(kept) if one.column.priority == worst)
        kept = kept[:last] + kept[last + 1 :]
        yield kept


def _table(columns: list[_Filled[Row]], header: bool) -> Table:
    table = Table(
        box=SIMPLE_HEAD, header_style="bold", show_header=header, show_edge=False, pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),
    )  # fmt: skip
    for one in columns:
        folds = one.column.folds
        table.add_column(
            Text("\n".join(one.header)),
            justify="right" if one.column.right else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "crop",
            width=None if folds else one.width,
        )
    for cells in zip(*(one.cells for one in columns), strict=True):
        table.add_row(*cells)
    return table


def _print_stacked(columns: list[_Filled[Row]], console: Console) -> None:
    """The first column of each row on a line of its own, the others under it."""
    first, others = columns[0], columns[1:]
    table = _table(others, header=True)
    table.width = _width([one.width for one in others])
    lines = console.render_lines(table, console.options.update(width=table.width), new_lines=True)
    n_rows = len(first.cells)
    titles, numbers = lines[: len(lines) - n_rows], lines[len(lines) - n_rows :]
    indent = Segment(" " * _INDENT)
    console.print(Text(" ".join(first.header), "bold"), soft_wrap=True)
    for line in titles:
        console.print(Segments([indent, *line]), end="", crop=False)
    for cell, line in zip(first.cells, numbers, strict=True):
        console.print(cell, soft_wrap=True)
        console.print(Segments([indent, *line]), end="", crop=False)
