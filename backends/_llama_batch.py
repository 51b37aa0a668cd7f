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
from evalq.engine.columns import (
    ACCEPTANCE,
    ARGMAX,
    BESIDE,
    ENTROPY,
    KLD,
    LOGPROB,
    MAX_PROB,
    OWN,
    REFERENCE_LOGPROB,
    TOP1,
)


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
        position_N = np.tile(np.arange(first, first + n_positions), n_rows)
        sequence_N = np.repeat(np.arange(n_rows), n_positions)
        return self.fill_tokens(ids_BP.ravel(), position_N, sequence_N, position_N >= scored_from)

    def fill_tokens(
        self,
        ids_N: NDArray[Any],
        position_N: NDArray[Any],
        sequence_N: NDArray[Any],
        wanted_N: NDArray[np.bool_],
    ) -> Any:
        """A llama_batch of any tokens: position and sequence of each, and whether its logits are wanted."""
        n = len(ids_N)
        self.token[:n], self.position[:n] = ids_N, position_N
        self.sequence[:n], self.wanted[:n] = sequence_N, wanted_N
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


COLUMNS = (*OWN, *BESIDE)


def score_rows(
    logits_NV: NDArray[np.float32],
    targets_N: Ids,
    columns: Sequence[str],
    pool: Executor | None = None,
    n_slices: int = 1,
    reference_NV: NDArray[np.float32] | None = None,
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
        reference_NV: logits of the reference, overwritten; needed for the columns beside it.
    """
    n = len(targets_N)
    found: Scores = {column.name: np.empty(n, column.dtype) for column in COLUMNS if column.name in columns}
    rows = _Rows(logits_NV, targets_N, reference_NV, found)
    if pool is None:
        rows.score(slice(0, n))
        return found
    cuts = [n * i // n_slices for i in range(n_slices + 1)]
    jobs = [pool.submit(rows.score, slice(a, b)) for a, b in pairwise(cuts) if a < b]
    for job in jobs:
        job.result()
    return found


@dataclass(frozen=True)
class _Rows:
    """What the threads share: logits in, columns out."""

    logits_NV: NDArray[np.float32]
    targets_N: Ids
    reference_NV: NDArray[np.float32] | None
    found: Scores

    def score(self, rows: slice) -> None:
        """Some rows, one after the other."""
        found = self.found
        exp_V = np.empty(self.logits_NV.shape[1], np.float32)
        # Both are needed at once only for these; one row less in the cache is faster.
        both = ENTROPY.name in found or self.reference_NV is not None
        below_V = np.empty_like(exp_V) if both else exp_V
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for i in range(rows.start, rows.stop):
                row_V, target = self.logits_NV[i], self.targets_N[i]
                top, own = row_V.max(), row_V[target]
                np.subtract(row_V, top, out=below_V)
                np.exp(below_V, out=exp_V)
                total = float(exp_V.sum())
                alone = {
                    LOGPROB.name: float(own - top) - np.log(total),
                    TOP1.name: own == top,
                    MAX_PROB.name: 1 / total,
                }
                for name in alone.keys() & found.keys():
                    found[name][i] = alone[name]
                if ARGMAX.name in found:
                    found[ARGMAX.name][i] = row_V.argmax()
                if self.reference_NV is not None:
                    self._beside(i, below_V, exp_V, total)
                if ENTROPY.name in found:
                    mean = float(np.multiply(exp_V, below_V, out=exp_V).sum()) / total
                    found[ENTROPY.name][i] = np.log(total) - mean

    def _beside(self, i: int, q_V: NDArray[np.float32], exp_q_V: NDArray[np.float32], sum_q: float) -> None:
        """A row beside the reference's; both are logits below their maximum, over what both share."""
        assert self.reference_NV is not None
        found, p_V = self.found, self.reference_NV[i]
        p_V -= p_V.max()
        exp_p_V = np.exp(p_V)
        sum_p = float(exp_p_V.sum())
        if REFERENCE_LOGPROB.name in found:
            found[REFERENCE_LOGPROB.name][i] = float(p_V[self.targets_N[i]]) - np.log(sum_p)
        shared = min(len(p_V), len(q_V))
        if len(p_V) > shared:
            p_V, exp_p_V = p_V[:shared], exp_p_V[:shared]
            sum_p = float(exp_p_V.sum())
        if len(q_V) > shared:
            q_V, exp_q_V = q_V[:shared], exp_q_V[:shared]
            sum_q = float(exp_q_V.sum())
        if KLD.name in found:
            np.subtract(p_V, q_V, out=p_V)
            p_V *= exp_p_V
            mean = float(p_V.sum()) / sum_p
            if np.isnan(mean):  # where p is zero it does not matter what q is
                mean = float(p_V[exp_p_V > 0].sum()) / sum_p
            found[KLD.name][i] = mean - np.log(sum_p) + np.log(sum_q)
        if ACCEPTANCE.name in found:
            exp_p_V *= np.float32(sum_q / sum_p)
            found[ACCEPTANCE.name][i] = float(np.minimum(exp_p_V, exp_q_V, out=exp_p_V).sum()) / sum_q
