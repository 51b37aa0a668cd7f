"""Whether a quantized KV cache is read at all.

An engine may ignore the option, or attend to the keys and values that it has just computed and never read
those that it stored. Then a run would show the unquantized cache's numbers under another name. So, before
anything is scored, one window is scored twice: as all will be, and with other numbers in the cache. What is
the same bit for bit was not measured.
"""

import numpy as np

from evalq.data.tokens import TokenStream
from evalq.data.windows import WindowPlan
from evalq.engine.backend import Backend, Batch, LoadedModel
from evalq.engine.columns import LOGPROB
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError


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
