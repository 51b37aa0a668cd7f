"""Logits that pass through vLLM's worker, reduced to numbers per token.

A few rows at a time are worked on, and only their numbers are brought to the host, without waiting for the
GPU. An error raised here would end the engine without its words, so it is kept for whoever takes the results.

Axes in names: n rows of logits, R targets of a window, V vocabulary, d inputs of the head, C columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends._torch_reference import TorchReference, pack_rows
from evalq.backends._torch_scores import COLUMNS, score_rows
from evalq.backends._vllm_rows import read_rows
from evalq.engine.columns import BESIDE
from evalq.engine.failures import from_exception
from evalq.engine.reference import Packed
from evalq.errors import ModelError

_BESIDE = {column.name for column in BESIDE}
_DTYPES = {column.name: np.dtype(column.dtype) for column in COLUMNS}


@dataclass(eq=False)
class Expected:
    """A window on its way through the engine.

    Args:
        name: of its request.
        targets: the scored tokens, R.
        first_target: index of the first of them among the window's tokens, at least 1.
        file: the reference's rows, "" for a window that is not compared.
        keep: whether the inputs of its head are kept.
        targets_R: the same targets on the device, int64.
        staged_R: the reference's rows, where they were read already.
        found: (targets, their numbers [C, n] on the host, an event after which these are there).
        rows: [R, width], where they are kept.
        scored: which targets are done, bool [R].
    """

    name: str
    targets: Sequence[int]
    first_target: int
    file: str
    keep: bool
    targets_R: Any = None
    staged_R: Any = None
    found: list[tuple[slice, Any, Any]] = field(default_factory=list)
    rows: Packed | None = None
    scored: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """None is done."""
        self.scored = np.zeros(self.n_targets, bool)

    @property
    def n_targets(self) -> int:
        """R."""
        return len(self.targets)

    @property
    def n_tokens(self) -> int:
        """T, of the whole window."""
        return self.first_target + self.n_targets


@dataclass(frozen=True)
class Piece:
    """Rows of logits that belong to one window.

    Args:
        window: None for a request that nobody asked about.
        position: in the window of the token whose logits are in the first row.
        row: the first one.
        n_rows: how many.
    """

    window: Expected | None
    position: int
    row: int
    n_rows: int

    def inside(self, chunk: range) -> "Piece":
        """What of it lies in a chunk of the rows, counted from the chunk's first row."""
        first = max(self.row, chunk.start)
        n_rows = min(self.row + self.n_rows, chunk.stop) - first
        return Piece(self.window, self.position + first - self.row, first - chunk.start, n_rows)


class Tap:
    """Reduces the logits that a model runner makes, window by window."""

    def __init__(
        self, device: Any, columns: tuple[str, ...], reference: TorchReference | None, chunk_bytes: int
    ) -> None:
        """`chunk_bytes` of float32 logits are worked on at once."""
        self._windows: dict[str, Expected] = {}
        self._device = device
        self._columns = columns
        self._reference = reference
        self._chunk_bytes = chunk_bytes
        self._rows_nd: Any = None
        self._failure: list[str] | None = None

    def note_rows(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before logits are made: (head, what goes into it [n, d], ...)."""
        self._rows_nd = inputs[1]

    def expect(self, windows: Sequence[Expected], given_up: Sequence[str]) -> None:
        """Windows that will come, and names of earlier ones that nobody will take."""
        import torch

        for name in given_up:
            self._windows.pop(name, None)
        for window in windows:
            window.targets_R = torch.tensor(window.targets, dtype=torch.int64).to(self._device)
            self._windows[window.name] = window

    def window(self, request: str) -> Expected | None:
        """Newer versions put "-" and random letters behind a request's name."""
        return self._windows.get(request) or self._windows.get(request.rpartition("-")[0])

    def reduce(self, pieces: Sequence[Piece], logits_nV: Any, overwrite: bool) -> None:
        """Work out the columns of pieces of a chunk of logits.

        Args:
            pieces: which rows are whose.
            logits_nV: in any floating-point type.
            overwrite: whether nobody reads them afterwards.
        """
        if self._failure is not None:
            return
        try:
            for piece in pieces:
                self._reduce(piece, logits_nV, overwrite)
        except Exception as error:  # an error raised here would end the engine without its words
            self._failure = plain(error)

    def take(self, names: Sequence[str], folder: Path) -> dict[str, Any]:
        """As ScoringExtension.evalq_take()."""
        windows = [self._windows.pop(name) for name in names]
        for window in windows:
            if self._failure is None and not window.scored.all():
                done, of = int(window.scored.sum()), window.n_targets
                message = f"vLLM showed the distributions of {done} of {of} tokens"
                self._failure = plain(ModelError(message, "engine_error"))
        if self._failure is not None:
            return {"failure": self._failure}
        for window in windows:
            if window.rows is not None:
                np.save(folder / f"{window.name}.npy", window.rows, allow_pickle=False)
        return {window.name: self._columns_of(window) for window in windows}

    def _names(self, window: Expected) -> list[str]:
        return [name for name in self._columns if window.file or name not in _BESIDE]

    def _columns_of(self, window: Expected) -> dict[str, bytes]:
        names = self._names(window)
        numbers_CR = np.empty((len(names), window.n_targets), np.float32)
        for part, numbers, there in window.found:
            if there is not None:
                there.synchronize()
            numbers_CR[:, part] = numbers.numpy()
        return {
            name: (row.view(np.int32) if _DTYPES[name].kind == "i" else row).tobytes()
            for name, row in zip(names, numbers_CR, strict=True)
        }

    def _reduce(self, piece: Piece, logits_nV: Any, overwrite: bool) -> None:
        if len(logits_nV) < piece.row + piece.n_rows:
            message = f"vLLM scored {len(logits_nV) - piece.row} tokens where {piece.n_rows} were scheduled"
            raise ModelError(message, "engine_error")
        window = piece.window
        if window is None:
            return
        before = window.first_target - 1 - piece.position  # rows of tokens that are not scored
        first = max(0, before)
        part = slice(first - before, piece.n_rows - before)
        if part.start >= part.stop:
            return
        rows = slice(piece.row + first, piece.row + piece.n_rows)
        if window.keep:
            self._keep(window, part, rows, len(logits_nV))
        scores_RV = logits_nV[rows]
        copied = not overwrite and str(scores_RV.dtype) == "torch.float32"
        found = score_rows(
            lambda some: scores_RV[some].clone() if copied else scores_RV[some],
            window.targets_R[part],
            max(1, self._chunk_bytes // (4 * scores_RV.shape[-1])),
            self._names(window),
            reference_of=self._reference_of(window, part),
        )
        window.found.append((part, *_on_host([found[name] for name in self._names(window)])))
        window.scored[part] = True

    def _reference_of(self, window: Expected, part: slice) -> Callable[[slice], Any] | None:
        """Rows of a part of a window -> logits of the reference."""
        reference = self._reference
        if reference is None or not window.file:
            return None
        if window.staged_R is None:
            packed_R = read_rows(Path(window.file), window.n_targets, reference.head)
            window.staged_R = reference.staged(packed_R)
        rows_Rd = reference.placed(window.staged_R[part])
        return lambda rows: reference.logits(rows_Rd[rows])

    def _keep(self, window: Expected, part: slice, rows: slice, n_rows: int) -> None:
        if self._rows_nd is None or len(self._rows_nd) != n_rows:
            raise ModelError("vLLM did not show what goes into the model's head", "engine_error")
        packed = pack_rows(self._rows_nd[rows])
        if window.rows is None:
            window.rows = np.zeros((window.n_targets, packed.shape[-1]), packed.dtype)
        window.rows[part] = packed


def _on_host(columns: Sequence[Any]) -> tuple[Any, Any]:
    """Columns [n] -> their numbers [C, n] on the host, integers by their bits; and when they are there."""
    import torch

    as_floats = [
        column if column.is_floating_point() else column.to(torch.int32).view(torch.float32)
        for column in columns
    ]
    numbers = torch.stack(as_floats)
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return host, there


def plain(error: Exception) -> list[str]:
    """An error as plain data: message, category, remedy."""
    found = from_exception(error, "forward")
    return [found.message, found.category, found.remedy or ""]
