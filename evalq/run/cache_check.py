"""Whether a quantized KV cache is read at all.

An engine may ignore the option, or attend to the keys and values that it has just computed and never read
those that it stored. Then a run would show the unquantized cache's numbers under another name. So, before
anything is scored, one window is scored twice: as all will be, and with other numbers in the cache. What is
the same bit for bit was not measured. At the end the whole result is compared with those of the unquantized
cache that the store holds.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evalq.data.tokens import TokenStream
from evalq.data.windows import WindowPlan
from evalq.engine.backend import Backend, Batch, LoadedModel
from evalq.engine.columns import LOGPROB
from evalq.engine.kv_cache import BITS, KV_CACHE, KvCache, cache_of
from evalq.errors import ModelError
from evalq.results.store import ResultDir, Store, key_of


def check_cache(
    backend: Backend, model: LoadedModel, cache: KvCache, plan: WindowPlan, stream: TokenStream
) -> list[str]:
    """Score the longest window both ways.

    Returns:
        Notes for the record: where the engine cannot tell, they say so.

    Raises:
        ModelError: not_measured.
    """
    prefix = np.asarray(plan.prefix, np.int64)
    window = max(plan.windows, key=lambda window: len(window.ids(stream.ids_N, prefix)))
    ids_1T = window.ids(stream.ids_N, prefix)[None]
    batch = Batch(ids_1T, window.first_target(len(prefix)), (LOGPROB.name,))
    other = backend.score_other_cache(model, batch)
    if other is None:
        return [f"whether the KV cache in {cache} is read was not checked: the engine cannot tell"]
    (own,) = backend.score(model, [batch])
    if np.array_equal(own[LOGPROB.name], other[LOGPROB.name], equal_nan=True):
        raise ModelError(
            f"not measured: with other numbers in the {cache} cache the scores of a window of "
            f"{ids_1T.shape[1]} tokens are the same bit for bit, so it is not read",
            "not_measured",
        )
    return []


def check_stored(store: Store, identity: Mapping[str, Any], result: ResultDir) -> None:
    """Compare a finished result with those of the same model and text with an unquantized cache.

    Raises:
        ModelError: not_measured.
    """
    options = identity.get("options") or {}
    cache = cache_of(options)
    if cache is None or not cache.quantized:
        return
    found = result.scores()
    rest = {name: value for name, value in options.items() if name != KV_CACHE}
    named = [{KV_CACHE: name} for name in BITS if not KvCache(name, name).quantized]
    for plain in ({}, *named):
        other = store.result(key_of({**identity, "options": rest | plain})).scores()
        if found is None or other is None:
            continue
        own, theirs = (scores.columns.get(LOGPROB.name) for scores in (found, other))
        if own is not None and theirs is not None and np.array_equal(own, theirs, equal_nan=True):
            raise ModelError(
                f"not measured: every score with the {cache} cache is, bit for bit, the one with "
                f"{plain.get(KV_CACHE, 'the unquantized cache')}",
                "not_measured",
            )
