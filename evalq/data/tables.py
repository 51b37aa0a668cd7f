"""One column of a table: JSON Lines (.jsonl, also gzipped) and Parquet."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from evalq.data.text_files import read_file
from evalq.errors import DataError
from evalq.spec.base import shown
from evalq.spec.texts import TEXT_COLUMN

_BATCH_ROWS = 1000
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Column:
    """The values of one column, as JSON has them.

    Args:
        values: one a row.
        places: where each stands, as an error names it: "a.jsonl line 3".
        name: of the column.
    """

    values: tuple[Any, ...]
    places: tuple[str, ...]
    name: str

    def texts(self) -> tuple[str, ...]:
        """All values, which must be strings. Raises DataError with the first row that holds another type."""
        for value, place in zip(self.values, self.places, strict=True):
            if not isinstance(value, str):
                what = _KINDS.get(type(value), type(value).__name__)
                raise DataError(f'{place}: column "{self.name}" holds {what}, not text', _OTHER_COLUMN)
        return self.values


_KINDS = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a number",
    float: "a number",
}
_OTHER_COLUMN = 'name another "column" in the data spec, or correct the row'


def read_table(path: Path, column: str | None = None, rows: int | None = None) -> Column:
    """A column of a local file.

    Args:
        path: of a .jsonl, .jsonl.gz, .json.gz or .parquet file.
        column: its name, or a dotted path into nested objects; None for "text".
        rows: only the first so many; None for all.

    Raises:
        DataError: the file cannot be read, is empty, or a row has no such column.
    """
    is_parquet = path.name.lower().endswith(".parquet")
    found = _parquet(path, column or TEXT_COLUMN) if is_parquet else _json_lines(path)
    return column_of(found, column or TEXT_COLUMN, rows, str(path))


def column_of(found: Iterable[tuple[str, Any]], column: str, rows: int | None, table: str) -> Column:
    """One column of rows.

    Args:
        found: place and row, row by row.
        column: its name, or a dotted path.
        rows: only the first so many; None for all.
        table: what it is called in an error.

    Raises:
        DataError: there is no row, or one without the column.
    """
    values, places = [], []
    for place, row in islice(found, rows):
        values.append(_value(row, column, place))
        places.append(place)
    if not values:
        raise DataError(f"{table} is empty: it has no row", "take another file or data set")
    return Column(tuple(values), tuple(places), column)


def _value(row: Any, column: str, place: str) -> Any:
    """What a row holds in a column; a name with dots goes before a path."""
    if not isinstance(row, Mapping):
        what = _KINDS.get(type(row), "text")
        raise DataError(f"{place} is {what}, not an object with columns", 'write {"text": ...} in each line')
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f'{place} has no column "{shown(column)}"', _columns(row))
    return value


def _columns(row: Mapping[Any, Any]) -> str:
    names = ", ".join(shown(str(name), 40) for name in islice(row, _NAMES_SHOWN))
    more = f" and {len(row) - _NAMES_SHOWN} more" if len(row) > _NAMES_SHOWN else ""
    return f'set "column" to one of: {names}{more}' if names else "the row is an empty object"


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file of JSON objects, a line each; blank lines are none."""
    read_file_start(path)
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path} line {number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield place, _json(line, place)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} after line {number}: {error}") from None


def _json(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        what = f"{place} is not UTF-8: byte {error.start} of it (0x{line[error.start]:02x}) cannot be decoded"
        raise DataError(what, "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {error}", "write one JSON object a line") from None


def read_file_start(path: Path) -> None:
    """Raise DataError unless a regular file is there."""
    if not path.is_file():
        read_file(path)  # says what it is instead


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, with the columns that the wanted one lies in."""
    read_file_start(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow", 'pip install "evalq[data]"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (column, column.split(".")[0]) if name in names][:1]
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted or names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read {path}: {first[0][:200]}", "take a whole Parquet file") from None
