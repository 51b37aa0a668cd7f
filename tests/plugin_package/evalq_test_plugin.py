"""A backend outside evalq: every token has probability one half. One of its columns is its own."""

from collections.abc import Iterable, Iterator

import numpy as np

from evalq.engine.backend import Backend, Batch, LoadedModel, LoadRequest, Option, Scores
from evalq.engine.columns import LOGPROB, TOP1, Column

HEADS = Column("heads", "float32", "share of tosses before the token that showed its side")


class CoinBackend(Backend):
    """A coin."""

    distributions = ("evalq-test-plugin",)
    install = "pip install evalq-test-plugin"
    options = {"sides": Option((int,), "of the coin (default 2)", numeric=True)}
    columns = (LOGPROB, TOP1, HEADS)

    def load(self, request: LoadRequest) -> LoadedModel:
        return LoadedModel(request.options.get("sides", 2), 2**16, None, "cpu", "float32")

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        for batch in batches:
            everything: Scores = {
                "logprob": np.full(batch.shape, -np.log(model.handle), np.float32),
                "top1": np.ones(batch.shape, bool),
                "heads": (batch.targets_BR / 256).astype(np.float32),
            }
            yield {name: everything[name] for name in batch.columns}

    def reads(self, weights: str) -> str | None:
        return "" if weights == "plain" else f"a coin has no {weights}"

    def close(self, model: LoadedModel) -> None:
        model.handle = None
