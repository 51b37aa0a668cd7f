"""How many tokens of a window an engine takes at once.

One pass over a whole window is fastest, and what short windows get. Two things ask for steps through the
engine's KV cache: a type of cache that is to be measured (`evalq.engine.kv_cache`), and long windows. One
pass over T tokens holds T rows of every layer's widest part, and where the attention is not computed in tiles
(`"attention": "eager"`, masks of sliding windows) T x T numbers for each head: 2.3 GiB with 4 heads and 8192
tokens in transformers, where the tiled kernel takes 42 MiB.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from evalq.data.protocols import PROTOCOLS
from evalq.data.windows import WindowPlan
from evalq.engine import kv_cache

# What hf computes at once of short windows on a GPU too.
LONG_STEP_TOKENS = 8192
# After running out of memory.
SMALL_STEP_TOKENS = 1024


def step_tokens(options: Mapping[str, Any], plans: Iterable[WindowPlan], divide_work: int = 1) -> int | None:
    """Tokens of a window in one pass at most; None for whole windows.

    Args:
        options: of the engine, checked.
        plans: that one load of the model is for.
        divide_work: 2 after running out of memory.
    """
    steps = LONG_STEP_TOKENS if divide_work == 1 else SMALL_STEP_TOKENS
    # Other protocols' windows are as they were scored before there were steps, which round differently.
    longest = max((plan.longest_tokens for plan in plans if PROTOCOLS[plan.protocol].in_steps), default=0)
    asked = (kv_cache.step_tokens(options), steps if longest - 1 > steps else None)
    return min((found for found in asked if found is not None), default=None)
