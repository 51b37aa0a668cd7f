"""One llama_batch in, scores out: the arrays of a decode call and the log-sum-exp of its logits."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends import _llama
from evalq.engine.backend import Ids, Scores
from evalq.engine.columns import ENTROPY, LOGPROB, TOP1


@dataclass
class LlamaBatch:
    """The arrays behind one llama_batch: [n_batch] each, filled anew for every decode."""

    capacity: int
    token: NDArray[np.int32] = field(init=False)
    position: NDArray[np.int32] = field(init=False)
    sequence: NDArray[np.int32] = field(init=False)
    wanted: NDArray[np.int8] = field(init=False)

    def __post_init__(self) -> None:
        """Allocate, and point each token's list of sequences at its one entry of `sequence`."""
        n = self.capacity
        self.token, self.position = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.sequence, self.wanted = np.zeros(n, np.int32), np.zeros(n, np.int8)
        self._one = np.ones(n, np.int32)
        self._addresses = self.sequence.ctypes.data + 4 * np.arange(n, dtype=np.uintp)

    def fill(self, ids_BP: Ids, first: int, scored_from: int) -> Any:
        """A llama_batch of positions first.. of each row; logits wanted at positions >= scored_from."""
        n_rows, n_positions = ids_BP.shape
        n = ids_BP.size
        self.token[:n] = ids_BP.ravel()
        self.position[:n] = np.tile(np.arange(first, first + n_positions), n_rows)
        self.sequence[:n] = np.repeat(np.arange(n_rows), n_positions)
        self.wanted[:n] = self.position[:n] >= scored_from
        int32 = ctypes.POINTER(ctypes.c_int32)
        return _llama.engine().llama_batch(
            n_tokens=n,
            token=self.token.ctypes.data_as(int32),
            embd=None,
            pos=self.position.ctypes.data_as(int32),
            n_seq_id=self._one.ctypes.data_as(int32),
            seq_id=self._addresses.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )


COLUMNS = (LOGPROB, TOP1, ENTROPY)


def score_rows(
    logits_NV: NDArray[np.float32],
    targets_N: Ids,
    columns: Sequence[str],
    pool: Executor | None = None,
    n_slices: int = 1,
) -> Scores:
    """Columns of each row's target, [N], without a copy of the logits larger than one row per slice.

    A row at a time stays in the L2 cache. float32 sums over a row are pairwise in numpy, which keeps
    log-sum-exp within 2e-6 of float64. A row with NaN or an infinite maximum gives NaN; `top1` is whether no
    other logit of the row is larger than the target's.

    Args:
        logits_NV: float32, unchanged on return.
        targets_N: the column scored in each row.
        columns: names of COLUMNS.
        pool: threads to score the slices in (numpy releases the interpreter lock), None for this one.
        n_slices: how many parts the rows are cut into.
    """
    n = len(targets_N)
    # Those not asked for cost a store of one number a row.
    everything = {column.name: np.empty(n, column.dtype) for column in COLUMNS}
    found = {name: everything[name] for name in columns}
    entropy = ENTROPY.name in found
    if pool is None:
        _score_slice(logits_NV, targets_N, everything, slice(0, n), entropy)
        return found
    cuts = [n * i // n_slices for i in range(n_slices + 1)]
    jobs = [
        pool.submit(_score_slice, logits_NV, targets_N, everything, slice(a, b), entropy)
        for a, b in pairwise(cuts)
        if a < b
    ]
    for job in jobs:
        job.result()
    return found


def _score_slice(
    logits_NV: NDArray[np.float32], targets_N: Ids, scores: Scores, rows: slice, entropy: bool
) -> None:
    scratch_V = np.empty(logits_NV.shape[1], np.float32)
    logprob, top1 = scores[LOGPROB.name], scores[TOP1.name]
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(rows.start, rows.stop):
            row_V = logits_NV[i]
            top, own = row_V.max(), row_V[targets_N[i]]
            np.subtract(row_V, top, out=scratch_V)
            np.exp(scratch_V, out=scratch_V)
            total = float(scratch_V.sum())
            logprob[i] = float(own - top) - np.log(total)
            top1[i] = own == top
            if entropy:
                mean = float(np.multiply(scratch_V, row_V - top, out=scratch_V).sum()) / total
                scores[ENTROPY.name][i] = np.log(total) - mean
