"""A JSON file from anywhere, read within bounds: whatever it holds, the answer is quick and one line."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from evalq.errors import SpecError
from evalq.spec.base import shown

BYTES_MAX = 4 * 2**20
DEPTH_MAX = 32


def read_json(path: Path) -> Any:
    """The value in a spec file. A byte order mark is skipped.

    Raises:
        SpecError: with line and column where there is one; also for values that no spec can hold (numbers
            beyond 64 bits, NaN, half a surrogate pair, deep nesting) and for files over 4 MiB.
    """
    text = read_text(path, BYTES_MAX)
    try:
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno} column {error.colno}"
        raise SpecError(f"{where}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise SpecError(f"{path}: {_NESTED}") from None
    except ValueError as error:
        raise SpecError(f"{path}: {str(error).split(';')[0]}") from None
    _require_ordinary(value, path)
    return value


def read_text(path: Path, bytes_max: int) -> str:
    """A UTF-8 file. Raises SpecError, also for one over `bytes_max`."""
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > bytes_max:
        raise SpecError(f"{path}: larger than {bytes_max / 2**20:g} MiB, which no such file is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not UTF-8 text") from None


_NESTED = f"nested more than {DEPTH_MAX} deep"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _require_ordinary(value: Any, path: Path) -> None:
    """Raise SpecError for what json.loads() takes and no spec can hold."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH_MAX:
            raise SpecError(f"{path}: {_NESTED}")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            else:
                _require_ordinary_leaf(item, path)
        level, depth = below, depth + 1


def _require_ordinary_leaf(item: Any, path: Path) -> None:
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError:
            text = shown(item.encode("ascii", "backslashreplace").decode())
            raise SpecError(f'{path}: "{text}" holds half of a surrogate pair') from None
    elif isinstance(item, float) and not math.isfinite(item):
        raise SpecError(f"{path}: a number is too large")
    elif isinstance(item, int) and abs(item) >= 2**63:
        raise SpecError(f"{path}: the number {shown(str(item), 25)} does not fit in 64 bits")
