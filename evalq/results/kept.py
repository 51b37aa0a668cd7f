"""The rows of a reference in the store: what its distributions are made of again, window by window.

    STORE/references/FAMILY/head.json                        how a row becomes logits
    STORE/references/FAMILY/START-END-FROM-HEAD.safetensors  the rows of one window, and its log-probabilities

A window's rows depend on its own tokens only, so comparisons with more or fewer windows share them. A file
that is cut short, or was made for another head, counts as not there.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evalq.data.windows import Window, WindowPlan
from evalq.engine.backend import Inputs
from evalq.engine.columns import BESIDE, BOUND, REFERENCE
from evalq.engine.reference import Packed, ReferenceHead
from evalq.errors import ModelError, StoreError
from evalq.files import read_json, write_atomic, write_json

_BESIDE = {column.name for column in (*BESIDE, *BOUND)}
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError)
# In run.json: the rows could not be kept within that many bytes, which the run's notes explain.
NOT_KEPT = "reference_not_kept_within"
# Left free on the disk, for the results beside the reference.
_SPARE_BYTES = 2**28


def stored_name(column: str, family: str | None) -> str:
    """The name of a column in the store: one beside a reference names the reference's family."""
    return f"{column}@{family[:16]}" if family is not None and column in _BESIDE else column


def stored_names(columns: Iterable[str], kept: "KeptReference | None") -> tuple[str, ...]:
    """The names of columns in the store, of a model that is compared with `kept`."""
    family = None if kept is None else kept.family
    return tuple(stored_name(column, family) for column in columns)


def plain_columns(columns: Mapping[str, Any], family: str | None) -> dict[str, Any]:
    """Stored columns by their plain names; those beside other references are left out."""
    ending = "" if family is None else f"@{family[:16]}"
    found = {name: column for name, column in columns.items() if "@" not in name}
    if ending:
        found |= {n.removesuffix(ending): column for n, column in columns.items() if n.endswith(ending)}
    return found


class KeptReference:
    """The folder of one reference on one token stream and protocol."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist yet; its name is the family's."""
        self.path = path
        self._head: ReferenceHead | None = None

    @property
    def family(self) -> str:
        """Of the reference's results."""
        return self.path.name

    def head(self) -> ReferenceHead | None:
        """How a row becomes logits; None where nothing is kept."""
        try:
            self._head = ReferenceHead.model_validate(read_json(self.path / "head.json"))
        except ValueError:
            self._head = None
        return self._head

    def there(self, plan: WindowPlan) -> NDArray[np.bool_]:
        """Which windows of a plan can be read, bool [W]."""
        head = self.head()
        if head is None:
            return np.zeros(len(plan.windows), bool)
        return np.array([self._holds(window, head) for window in plan.windows], bool)

    def begin(self, head: ReferenceHead, plan: WindowPlan, most_bytes: int | None) -> None:
        """Make ready for a plan's rows: forget those of another head, look for room on the disk.

        Raises:
            ModelError: bad_option, where they would take more than `most_bytes`.
            StoreError: the disk has no room, or cannot be written.
        """
        known = self.head()
        if known is None or known.digest != head.digest:
            shutil.rmtree(self.path, ignore_errors=True)
        there = self.there(plan)
        every = sum(window.n_targets for window in plan.windows) * head.row_bytes
        if most_bytes is not None and every > most_bytes:
            raise ModelError(
                f"what it needs takes {every / 1e9:.1f} GB, allowed are {most_bytes / 1e9:.1f} GB",
                "bad_option",
                "raise --reference-max-gb, or score fewer windows",
            )
        left = sum(w.n_targets for w, have in zip(plan.windows, there, strict=True) if not have)
        write_json(self.path / "head.json", head.model_dump())
        free = shutil.disk_usage(self.path).free
        if left * head.row_bytes + _SPARE_BYTES > free:
            raise StoreError(
                f"the reference takes {left * head.row_bytes / 1e9:.1f} GB in {self.path}, where "
                f"{free / 1e9:.1f} GB are free",
                "free some space, name a folder on another disk with --store, or score fewer windows",
            )

    def write(self, window: Window, rows: Packed, logprob: NDArray[np.float32]) -> None:
        """Keep the rows of a window. Raises StoreError."""
        head = self._head or self.head()
        assert head is not None, "begin() comes first"
        tensors = {"rows": np.ascontiguousarray(rows), "logprob": np.asarray(logprob, np.float32)}
        write_atomic(self.file(window), save(tensors, {"head": head.digest}))

    def rows(self, window: Window) -> Packed:
        """The rows of a window, [R, width]. Raises ModelError (model_missing) where they cannot be read."""
        return self._tensor(window, "rows")

    def logprob(self, window: Window) -> NDArray[np.float32]:
        """The reference's own log-probabilities of a window, [R]. Raises ModelError (model_missing)."""
        return self._tensor(window, "logprob")

    def _tensor(self, window: Window, name: str) -> NDArray[Any]:
        head = self._head or self.head()
        with contextlib.suppress(*_UNREADABLE), safe_open(self.file(window), "numpy") as file:
            if head is not None and _fits(file, window, head):
                found: NDArray[Any] = file.get_tensor(name)
                return found
        raise ModelError(
            f"the reference's rows of tokens {window.start} to {window.end} cannot be read from {self.path}",
            "model_missing",
            "run again: the reference is scored again where its rows are missing",
        )

    def drop(self, windows: Iterable[Window]) -> None:
        """Forget windows."""
        for window in windows:
            self.file(window).unlink(missing_ok=True)

    def file(self, window: Window) -> Path:
        """Where a window's rows lie, or would."""
        name = f"{window.start}-{window.end}-{window.score_from}-{window.head}.safetensors"
        return self.path / name

    def _holds(self, window: Window, head: ReferenceHead) -> bool:
        try:
            with safe_open(self.file(window), "numpy") as file:
                return _fits(file, window, head)
        except _UNREADABLE:
            return False


def _fits(file: Any, window: Window, head: ReferenceHead) -> bool:
    """Whether an open file holds the rows of a window for this head, by its header."""
    if (file.metadata() or {}).get("head") != head.digest:
        return False
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("rows", "logprob")}
    return shapes == {"rows": (window.n_targets, head.row_shape[0]), "logprob": (window.n_targets,)}


# Reads what the next batch needs while one is scored.
_READER = ThreadPoolExecutor(1, "evalq-reference")


class KeptInputs(Inputs):
    """What a batch needs of the reference, read when it is asked for: all batches at once may not fit."""

    def __init__(self, kept: KeptReference, windows: tuple[Window, ...]) -> None:
        """Of these windows, in this order, all with the same number of targets."""
        self._kept = kept
        self._windows = windows
        self._coming: Future[Packed] | None = None

    def prefetch(self) -> None:
        """Start to read the rows."""
        self._coming = self._coming or _READER.submit(self._rows)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Rows of the reference, [B, R, width]. Raises KeyError, ModelError (model_missing)."""
        if name != REFERENCE:
            raise KeyError(name)
        coming, self._coming = self._coming, None
        return self._rows() if coming is None else coming.result()

    @property
    def files(self) -> list[Path]:
        """Where the rows lie: a safetensors file for each window, with "rows" [R, width]."""
        return [self._kept.file(window) for window in self._windows]

    def logprob(self) -> NDArray[np.float32]:
        """Log-probabilities of the reference when it was scored, [B, R]. Raises ModelError."""
        return np.stack([self._kept.logprob(window) for window in self._windows])

    def __iter__(self) -> Iterator[str]:
        """The one input there is."""
        return iter((REFERENCE,))

    def __len__(self) -> int:
        """One."""
        return 1

    def _rows(self) -> Packed:
        rows = [self._kept.rows(window) for window in self._windows]
        return rows[0][None] if len(rows) == 1 else np.stack(rows)
