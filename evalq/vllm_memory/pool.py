"""How vLLM cuts its KV memory into blocks, and how many tokens and sequences they hold.

One pool of blocks serves all layers. Layers that keep the same tokens form groups of equal size, and a block
belongs to one group at a time: it holds `block_tokens` tokens of every layer of that group. A sequence takes
blocks of every group, so a hybrid model's capacity is not memory / bytes per token:

- sliding windows and chunks hold, at most, their reach and one step's tokens;
- a state takes one block; where a model has both, attention blocks are enlarged until they hold a state.

Source: vLLM `v1/core/kv_cache_utils.py` (groups, capacity), `v1/kv_cache_interface.py` (blocks per request),
`platforms/interface.py` (enlarged blocks).
"""

import math
from collections import Counter
from dataclasses import dataclass

from evalq.vllm_memory.kv import CacheLayer

BLOCK_TOKENS = 16
# From this version the reported tokens are sequences x their length; before, blocks of the smallest group.
TOKENS_BY_LENGTH = (0, 29)


@dataclass(frozen=True)
class KvPool:
    """The pool on one GPU.

    Args:
        groups: one layer for each group, those of one kind next to one another.
        block_bytes: of one block, over all layers of a group.
        block_tokens: of attention in one block.
        step_tokens: the most tokens computed at once, which windows keep on top of their reach.
    """

    groups: tuple[CacheLayer, ...]
    block_bytes: int
    block_tokens: int
    step_tokens: int

    @property
    def is_hybrid(self) -> bool:
        """Whether anything but full attention is cached."""
        return any(group.kind != "full" for group in self.groups)

    @property
    def has_state(self) -> bool:
        """Whether a sequence takes memory that does not grow with it."""
        return any(group.kind == "state" for group in self.groups)

    def blocks_for(self, length: int) -> int:
        """Blocks that one sequence of `length` tokens takes."""
        return sum(self._group_blocks(group, length) for group in self.groups)

    def _group_blocks(self, group: CacheLayer, length: int) -> int:
        if group.kind == "state":
            return 1
        if group.kind == "full":
            return math.ceil(length / self.block_tokens)
        if group.kind == "chunk":
            return math.ceil(min(group.reach + self.step_tokens, length) / self.block_tokens)
        held = min(group.reach - 1 + self.step_tokens, length)
        return math.ceil(held / self.block_tokens) + 1

    def sequences(self, kv_bytes: float, length: int) -> float:
        """How many sequences of `length` tokens fit at once."""
        return self._blocks(kv_bytes) / self.blocks_for(length)

    def tokens(self, kv_bytes: float, length: int, version: tuple[int, int]) -> int:
        """Capacity in tokens, as vLLM's "KV cache size" counts it for a max_model_len of `length`."""
        blocks = self._blocks(kv_bytes)
        if not self.is_hybrid:
            return blocks * self.block_tokens
        if version >= TOKENS_BY_LENGTH:
            return int(blocks / self.blocks_for(length) * length)
        # A state's block counts as max_model_len tokens.
        smallest = min(self.block_tokens, length) if self.has_state else self.block_tokens
        return blocks // len(self.groups) * smallest

    def longest(self, kv_bytes: float, limit: int) -> int:
        """The longest sequence that fits alone, at most `limit`; 0 when none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequences(kv_bytes, middle) >= 1 else (low, middle - 1)
        return low

    def _blocks(self, kv_bytes: float) -> int:
        return max(0, int(kv_bytes // self.block_bytes))


def make_pool(layers: list[list[CacheLayer]], step_tokens: int) -> KvPool:
    """The pool of the layers of one GPU.

    Args:
        layers: what each of them caches, in order; at least one caches something.
        step_tokens: the most tokens computed at once (max_num_batched_tokens).
    """
    counts = Counter(cached for layer in layers for cached in layer)
    attention = max((cached.bytes for cached in counts if cached.kind != "state"), default=0)
    state = max((cached.bytes for cached in counts if cached.kind == "state"), default=0)
    block_tokens = BLOCK_TOKENS
    if attention and state:
        block_tokens *= math.ceil(state / (BLOCK_TOKENS * attention))
    fewest, most = min(counts.values()), max(counts.values())
    # Nearly equal numbers are padded to the larger one instead of cut into many small groups.
    size = most if most < 1.5 * fewest else fewest
    groups = tuple(cached for cached, number in counts.items() for _ in range(math.ceil(number / size)))
    return KvPool(groups, size * max(block_tokens * attention, state), block_tokens, step_tokens)
