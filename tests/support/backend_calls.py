"""Calls of a backend's score() as the framework makes them, with what the contract promises checked."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from evalq.engine.backend import Backend, Batch, LoadedModel, Scores
from evalq.engine.columns import DEFAULT_COLUMNS
from evalq.run.checks import given_columns


def score_batches(backend: Backend, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
    """Scores of each batch: just the columns it asks for, in their declared dtypes, [B, R]."""
    dtypes = {column.name: np.dtype(column.dtype) for column in backend.columns}
    waiting: deque[Batch] = deque()

    def handed_over() -> Iterator[Batch]:
        for batch in batches:
            waiting.append(batch)
            yield batch

    for scores in backend.score(model, handed_over()):
        batch = waiting.popleft()
        assert set(scores) == set(batch.columns)
        for name, array in scores.items():
            assert array.shape == batch.shape and array.dtype == dtypes[name], name
        yield scores
    assert not waiting, "fewer scores than batches"


def score_one(
    backend: Backend,
    model: LoadedModel,
    ids_BT: NDArray[np.int64],
    first_target: int = 1,
    wanted: tuple[str, ...] = DEFAULT_COLUMNS,
) -> Scores:
    """Scores of one batch, asked for what this model gives of the wanted columns."""
    batch = Batch(ids_BT, first_target, given_columns(backend, model, wanted))
    (scores,) = score_batches(backend, model, [batch])
    return scores
