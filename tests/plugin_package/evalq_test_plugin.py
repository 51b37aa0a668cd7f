"""A backend outside evalq: every token has probability one half."""

import numpy as np

from evalq.backend import Ids, LoadedModel, LoadRequest, Option, TokenScores

DISTRIBUTIONS = ("evalq-test-plugin",)
INSTALL = "pip install evalq-test-plugin"
OPTIONS = {"sides": Option((int,), "of the coin (default 2)", numeric=True)}


def load(request: LoadRequest) -> LoadedModel:
    return LoadedModel(request.options.get("sides", 2), 2**16, None, "cpu", "float32")


def forward(model: LoadedModel, ids_BT: Ids, start: int) -> TokenScores:
    shape = ids_BT[:, start + 1 :].shape
    return TokenScores(np.full(shape, -np.log(model.handle), np.float32), np.ones(shape, bool))


def close(model: LoadedModel) -> None:
    model.handle = None
