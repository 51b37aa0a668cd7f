"""How much of a mixture of experts a text reached: what was not reached was not measured.

A quantized expert that no token of the text passes through adds nothing to any metric, however bad it is. So
the record says, layer by layer, how many experts the text reached, and one note sums it up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalq.engine.experts import ExpertTokens

# Where the facts of a run keep the counts.
EXPERTS = "experts"


class ExpertUse(BaseModel):
    """The experts of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int = Field(description="of the layer, shared ones left out")
    reached: int = Field(description="of these, given at least one token of the text")
    unreached: tuple[int, ...] = Field(description="numbers of the others, from 0")
    tokens: int = Field(
        description="that passed the router; one in several windows counts in each, and those "
        "of a batch that warms the engine up twice"
    )
    least_share: float = Field(description="of what its experts were given, the part of the least used one")
    most_share: float = Field(description="the part of the most used one; alike would be 1 / experts")


def to_facts(
    found: Mapping[str, ExpertTokens], before: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """What a run keeps: counts, those of its earlier sessions included.

    Args:
        found: module -> what went through its experts.
        before: what an earlier session of the run kept.
    """
    earlier = _counts(before or {})
    facts = {}
    for name in found.keys() | earlier.keys():
        one, other = found.get(name), earlier.get(name)
        both = [counted for counted in (one, other) if counted is not None]
        if len({counted.counts.size for counted in both}) == 1:
            counts = np.sum([counted.counts for counted in both], axis=0)
            facts[name] = {"tokens": sum(counted.tokens for counted in both), "counts": counts.tolist()}
        elif one is not None:
            facts[name] = {"tokens": one.tokens, "counts": one.counts.tolist()}
    return dict(sorted(facts.items(), key=lambda item: _by_number(item[0])))


def expert_use(facts: Any) -> dict[str, ExpertUse]:
    """Module -> its experts' use; {} where an engine does not show it, or for what is damaged."""
    found = {}
    for name, counted in _counts(facts).items():
        total, counts = int(counted.counts.sum()), counted.counts
        if total:
            found[name] = ExpertUse(
                experts=counts.size,
                reached=int(np.count_nonzero(counts)),
                unreached=tuple(np.flatnonzero(counts == 0).tolist()),
                tokens=counted.tokens,
                least_share=float(counts.min() / total),
                most_share=float(counts.max() / total),
            )
    return found


def expert_notes(use: Mapping[str, ExpertUse], tokens: int) -> list[str]:
    """One line on all layers; none without experts.

    Args:
        use: of every layer.
        tokens: that the windows hold, for a count that does not cover all of them.
    """
    if not use:
        return []
    layers = list(use.values())
    experts, reached = sum(one.experts for one in layers), sum(one.reached for one in layers)
    counted = min(one.tokens for one in layers)
    part = f", counted on {counted:,} of {tokens:,} tokens" if counted < tokens else ""
    if reached == experts:
        return [f"experts: the text reached all {experts:,} of {len(layers)} layers{part}"]
    name, least = min(use.items(), key=lambda item: item[1].reached / item[1].experts)
    return [
        f"experts: the text reached {reached / experts:.1%} of them ({reached:,} of {experts:,}), in {name} "
        f"only {least.reached} of {least.experts}{part}; what a format does to the others is not measured"
    ]


def _counts(facts: Any) -> dict[str, ExpertTokens]:
    """Facts of the store's JSON as counts; what has another form is left out."""
    found: dict[str, ExpertTokens] = {}
    for name, one in facts.items() if isinstance(facts, Mapping) else ():
        try:
            kept = _Kept.model_validate(one)
        except ValidationError:
            continue
        found[str(name)] = ExpertTokens(kept.tokens, np.asarray(kept.counts, np.int64))
    return found


class _Kept(BaseModel):
    tokens: int = Field(ge=1)
    counts: list[int] = Field(min_length=1)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
