"""The KV cache as a model spec's option: one spelling for all engines, translated by each.

    "kv_cache": "auto"           the engine's own, unquantized; the same as leaving it out
    "kv_cache": "q8_0"           keys and values alike
    "kv_cache": "q8_0/q4_0"      keys / values
    "kv_cache": "8/4"            EXL3: bits per element, as exllamav3 counts them

A quantized cache shows in the scores only where it is read. An engine that computes a window in one pass may
attend to the keys and values that it has just computed, so a window is scored in steps: later ones read what
earlier ones wrote. `Backend.score_other_cache` lets a run check that they did.

Bits per element hold the scales: llama.cpp's blocks are 32 elements with one or two float16 numbers
(`ggml/src/ggml-common.h`), exllamav3's 32 elements with one (`cache/quant.py`), HQQ's 64 with two. FP8's
scales are one per layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KV_CACHE = "kv_cache"
AUTO = "auto"
# The most tokens of a window in one forward pass, so that later ones read the cache. The same for all
# windows: what a window's scores depend on must not depend on the other windows of a run.
STEP_TOKENS = 512

# Name -> bits per element, scales included.
BITS: dict[str, float] = {
    "f32": 32.0,
    "fp16": 16.0,
    "bf16": 16.0,
    "fp8": 8.0,
    "fp8_e5m2": 8.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
    **{f"hqq{bits}": bits + 0.5 for bits in (8, 4, 3, 2, 1)},
    **{str(bits): bits + 0.5 for bits in range(8, 1, -1)},
}
_SAME_AS = {"f16": "fp16", "fp32": "f32", "fp8_e4m3": "fp8"}
_UNQUANTIZED_BITS = 16.0


@dataclass(frozen=True)
class KvCache:
    """Types of cached keys and values, names of BITS."""

    k: str
    v: str

    def __str__(self) -> str:
        """As a spec spells it."""
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def k_bits(self) -> float:
        """Bits per element of the keys."""
        return BITS[self.k]

    @property
    def v_bits(self) -> float:
        """Bits per element of the values."""
        return BITS[self.v]

    @property
    def bits(self) -> float:
        """Of both: there are as many values as keys."""
        return (self.k_bits + self.v_bits) / 2

    @property
    def quantized(self) -> bool:
        """Whether keys or values are."""
        return min(self.k_bits, self.v_bits) < _UNQUANTIZED_BITS


def parse(text: str) -> KvCache | None:
    """The types that a spec's text names; None for "auto".

    Raises:
        ValueError: no such type.
    """
    sides = [_SAME_AS.get(side, side) for side in text.strip().lower().split("/")]
    if sides == [AUTO]:
        return None
    if len(sides) > 2 or not all(side in BITS for side in sides):
        raise ValueError(f'"{text}" is no type of KV cache')
    return KvCache(sides[0], sides[-1])


def cache_of(options: Mapping[str, Any]) -> KvCache | None:
    """The types that checked options name; None for the engine's own."""
    return parse(str(options.get(KV_CACHE, AUTO)))


def step_tokens(options: Mapping[str, Any]) -> int | None:
    """Tokens of a window in one pass at most, by checked options; None with the engine's own cache."""
    return None if cache_of(options) is None else STEP_TOKENS


@dataclass(frozen=True)
class CacheTypes:
    """What an engine can store keys and values in.

    Args:
        engine: its name, for messages.
        types: names of BITS.
        alike: keys and values have one type.
        more: what a reader of the option's help should know besides.
    """

    engine: str
    types: tuple[str, ...]
    alike: bool = False
    more: str = ""

    @property
    def listed(self) -> str:
        """Everything that a spec may say."""
        return ", ".join((AUTO, *self.types)) + ("" if self.alike else '; keys and values apart as "K/V"')

    @property
    def help(self) -> str:
        """Of the option, one line."""
        more = f"; {self.more}" if self.more else ""
        return f"type of cached keys and values, scored in steps that read it: {self.listed}{more}"

    def canonical(self, given: str) -> str | None:
        """A spec's text as identities hold it, None for "auto".

        Raises:
            ValueError: the engine has no such type; the types that it has.
        """
        try:
            found = parse(given)
        except ValueError as error:
            raise ValueError(f"{error}; {self.engine} has {self.listed}") from None
        if found is None:
            return None
        for side in (found.k, found.v):
            if side not in self.types:
                raise ValueError(f"{self.engine} has no KV cache of type {side}; it has {self.listed}")
        if self.alike and found.k != found.v:
            raise ValueError(f"{self.engine} stores keys and values in one type; it has {self.listed}")
        return str(found)


def step_bounds(n_tokens: int, most: int) -> list[int]:
    """Where to cut a window into steps: [0, ..., n_tokens], equal ones, because kernels go by their size.

    Args:
        n_tokens: at least 1.
        most: tokens of a step.
    """
    n_steps = -(-n_tokens // most)
    return [n_tokens * i // n_steps for i in range(n_steps + 1)]
