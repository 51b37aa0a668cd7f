"""What a record says of experts: counts of several sessions, shares, one note."""

from typing import Any

import numpy as np
import pytest

from evalq.engine.experts import ExpertTokens
from evalq.results.experts import expert_notes, expert_use, to_facts


def counted(*counts: int, k: int = 1) -> ExpertTokens:
    return ExpertTokens(sum(counts) // k, np.array(counts, np.int64))


def test_shares_and_numbers_of_the_unreached() -> None:
    use = expert_use(to_facts({"layers.0.experts": counted(6, 0, 3, 0, 1)}))["layers.0.experts"]
    assert (use.experts, use.reached, use.unreached, use.tokens) == (5, 3, (1, 3), 10)
    assert (use.least_share, use.most_share) == (0.0, 0.6)


def test_sessions_add_up_and_layers_stand_in_their_order() -> None:
    first = to_facts({"layers.10.experts": counted(1, 0), "layers.2.experts": counted(0, 2)})
    both = to_facts({"layers.2.experts": counted(3, 0), "layers.10.experts": counted(1, 0)}, first)
    assert list(both) == ["layers.2.experts", "layers.10.experts"]
    assert both["layers.2.experts"] == {"tokens": 5, "counts": [3, 2]}
    assert expert_use(both)["layers.10.experts"].unreached == (1,)


def test_an_earlier_session_of_another_size_does_not_count() -> None:
    before = {"layers.0.experts": {"tokens": 4, "counts": [4, 0, 0]}}
    assert to_facts({"layers.0.experts": counted(1, 1)}, before)["layers.0.experts"]["counts"] == [1, 1]


@pytest.mark.parametrize(
    "damaged",
    [None, [], "x", {"a": None}, {"a": {"tokens": "?", "counts": [1]}}, {"a": {"tokens": 3, "counts": []}}],
)
def test_facts_that_are_damaged_are_left_out(damaged: Any) -> None:
    assert expert_use(damaged) == {}


def test_one_note() -> None:
    every = expert_use(to_facts({"a.0.experts": counted(2, 2), "a.1.experts": counted(3, 1)}))
    assert expert_notes(every, 4) == ["experts: the text reached all 4 of 2 layers"]
    some = expert_use(to_facts({"a.0.experts": counted(2, 2), "a.1.experts": counted(4, 0)}))
    (note,) = expert_notes(some, 4)
    assert "75.0% of them (3 of 4), in a.1.experts only 1 of 2;" in note and "counted on" not in note
    (note,) = expert_notes(some, 9)
    assert "counted on 4 of 9 tokens" in note
    assert expert_notes({}, 9) == []
