"""Per-token columns on disk: one safetensors file, whatever columns it holds, checked when it is read.

A file of a finished result holds every window of its plan; a part holds the windows of one batch. Both name
the digest of their plan. A file of another plan, or one that contradicts itself, counts as not there.

Where a plan has a mask, files hold every target and the mask; what computes figures sees the targets that
count (`TokenColumns.counted`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evalq.data.windows import WindowPlan
from evalq.results.kept import plain_columns

Array = NDArray[Any]
# Tensors that say where columns belong; no column has such a name.
WINDOW, WINDOWS, MASK = "window", "windows", "mask"
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError)


@dataclass(frozen=True)
class Timing:
    """How long scoring took.

    Args:
        seconds: in the engine, without warm-up and work that is done once.
        tokens: scored in that time; none where scoring was not timed.
        options: the engine's options, as JSON with sorted keys; "" when unknown or not the same throughout.
    """

    seconds: float = 0.0
    tokens: int = 0
    options: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """None where nothing was timed."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens else None

    def __add__(self, other: "Timing") -> "Timing":
        """Both together; options that differ are unknown."""
        if not other.tokens and (self.tokens or not other.options):
            return self
        options = other.options if not self.tokens or self.options == other.options else ""
        return Timing(self.seconds + other.seconds, self.tokens + other.tokens, options)

    def scaled(self, tokens: int) -> "Timing":
        """The share of so many tokens."""
        share = tokens / self.tokens if self.tokens else 0.0
        return Timing(self.seconds * share, tokens if self.tokens else 0, self.options)


@dataclass(frozen=True)
class TokenColumns:
    """Columns of a result, in window order.

    Args:
        columns: name -> [n], n tokens.
        window_of: index of the window each token was scored in, int64 [n].
        timing: of all sessions of the run.
        windows: int64 [W, 4] as `WindowPlan.table`, None in files of evalq 0.1.
        plan: the plan's digest, None in files of evalq 0.1.
        mask: which of these tokens count, bool [n]; None where all do.
        targets: which of the windows' targets these tokens are, int64 [n]; None where they are all of them.
    """

    columns: Mapping[str, Array]
    window_of: NDArray[np.int64]
    timing: Timing = field(default_factory=Timing)
    windows: NDArray[np.int64] | None = None
    plan: str | None = None
    mask: NDArray[np.bool_] | None = None
    targets: NDArray[np.int64] | None = None

    @property
    def counted(self) -> "TokenColumns":
        """The tokens that count, and no others."""
        if self.mask is None:
            return self
        columns = {name: column[self.mask] for name, column in self.columns.items()}
        targets = np.flatnonzero(self.mask)
        return replace(self, columns=columns, window_of=self.window_of[self.mask], mask=None, targets=targets)

    def of_these(self, of_targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of something known of every target of the windows, int64, what is about these tokens, [n]."""
        return of_targets if self.targets is None else of_targets[self.targets]

    def beside(self, family: str | None) -> "TokenColumns":
        """The same with plain names for what was scored beside this family's reference, and no other."""
        return replace(self, columns=plain_columns(self.columns, family))

    def belongs_to(self, plan: WindowPlan) -> bool:
        """Whether these are the tokens of a plan; 0.1 kept no digest, so there the windows' sizes decide."""
        if self.plan is not None and self.plan != plan.digest:
            return False
        return np.array_equal(self.window_of, self.of_these(plan.window_of))


@dataclass(frozen=True)
class Part:
    """Columns of the windows of one batch.

    Args:
        windows: their indices, [B].
        columns: name -> [B, R].
        timing: of the batch.
    """

    windows: tuple[int, ...]
    columns: Mapping[str, Array]
    timing: Timing


def encode(found: TokenColumns) -> bytes:
    """The file of a finished result."""
    tensors = {name: _stored(column) for name, column in found.columns.items()}
    tensors[WINDOW] = found.window_of
    if found.windows is not None:
        tensors[WINDOWS] = found.windows
    if found.mask is not None:
        tensors[MASK] = found.mask.astype(np.uint8)
    return save(tensors, _metadata(found.timing, found.columns.values(), found.columns, found.plan))


def encode_part(part: Part, plan_digest: str) -> bytes:
    """The file of a part."""
    tensors = {name: _stored(np.ascontiguousarray(column)) for name, column in part.columns.items()}
    tensors[WINDOW] = np.asarray(part.windows, np.int64)
    return save(tensors, _metadata(part.timing, part.columns.values(), part.columns, plan_digest))


def read_columns(file: Path) -> TokenColumns | None:
    """A finished result's file; None when it is missing, damaged or contradicts itself."""
    try:
        tensors, metadata = _read(file)
        window_of, windows = tensors.pop(WINDOW), tensors.pop(WINDOWS, None)
        mask = tensors.pop(MASK, None)
        if window_of.dtype != np.int64 or window_of.ndim != 1 or not tensors:
            return None
        if any(column.shape != window_of.shape for column in tensors.values()):
            return None
        if windows is not None and (windows.dtype != np.int64 or windows.ndim != 2 or windows.shape[1] != 4):
            return None
        if mask is not None and not _masks(mask, window_of, windows):
            return None
        counts = None if mask is None else mask.astype(bool)
        timing = _timing(metadata, window_of.size)
        return TokenColumns(tensors, window_of, timing, windows, metadata.get("plan"), counts)
    except _UNREADABLE:
        return None


def _masks(mask: Array, window_of: Array, windows: Array | None) -> bool:
    """Whether a mask is one of the windows' targets."""
    if windows is None or mask.dtype != np.uint8 or mask.shape != window_of.shape:
        return False
    return int((windows[:, 1] - windows[:, 2]).sum()) == mask.size


def read_part(file: Path, plan: WindowPlan) -> Part | None:
    """A part of this plan; None when it is missing, damaged, or of another plan."""
    try:
        tensors, metadata = _read(file)
        indices = tensors.pop(WINDOW)
        if metadata.get("plan") != plan.digest or indices.dtype != np.int64 or indices.ndim != 1:
            return None
        windows = tuple(int(index) for index in indices)
        if not windows or not all(0 <= index < len(plan.windows) for index in windows):
            return None
        targets = {plan.windows[index].n_targets for index in windows}
        if any(column.shape != (len(windows), *targets) for column in tensors.values()):
            return None
        return Part(windows, tensors, _timing(metadata, len(windows) * max(targets)))
    except _UNREADABLE:
        return None


def windows_in(file: Path) -> tuple[int, ...]:
    """Indices of the windows of a part, of whatever plan; none for a damaged file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return tuple(int(index) for index in opened.get_tensor(WINDOW).ravel())
    except _UNREADABLE:
        return ()


def _stored(column: Array) -> Array:
    """Safetensors' numpy writer keeps no bool; they are bytes, and the metadata says so."""
    return column.astype(np.uint8) if column.dtype == bool else column


def _metadata(
    timing: Timing, columns: Iterable[Array], names: Iterable[str], plan: str | None
) -> dict[str, str]:
    flags = [name for name, column in zip(names, columns, strict=True) if column.dtype == bool]
    metadata = {
        "seconds": repr(float(timing.seconds)),
        "tokens": str(timing.tokens),
        "options": timing.options,
        "bool": json.dumps(flags),
    }
    return metadata if plan is None else metadata | {"plan": plan}


def _read(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    with safe_open(file, framework="numpy") as opened:
        metadata = dict(opened.metadata() or {})
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    flags = json.loads(metadata.get("bool", '["top1"]'))  # 0.1 had this one
    return {
        name: column.astype(bool) if name in flags else column for name, column in tensors.items()
    }, metadata


def _timing(metadata: Mapping[str, str], n_tokens: int) -> Timing:
    """Raises ValueError, KeyError for metadata that is not ours."""
    seconds, tokens = float(metadata["seconds"]), int(metadata.get("tokens", n_tokens))
    if not 0 <= seconds < float("inf") or tokens < 0:
        raise ValueError("no time")
    return Timing(seconds, tokens, metadata.get("options", ""))
