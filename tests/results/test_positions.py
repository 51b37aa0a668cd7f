"""Positions that diverge most: which, in what order, and where they lie in the text."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evalq.data.windows import ProtocolSettings, StreamFacts, WindowPlan, plan_windows
from evalq.errors import StoreError
from evalq.results.positions import CONTEXT_TOKENS, most_diverging, quantities
from evalq.results.tokens import TokenColumns

IDS = np.arange(1000, 1400, dtype=np.int64)  # so that id - 1000 is the position


def plan_of(name: str = "gptq", eval_len: int = 100, stride: int = 100) -> WindowPlan:
    settings = ProtocolSettings(name=name, eval_len=eval_len, eval_stride=stride)
    return plan_windows(settings, StreamFacts(n_tokens=400))


def columns(plan: WindowPlan, **more: Any) -> TokenColumns:
    found = {"logprob": np.full(plan.n_targets, -1.0, np.float32), **more}
    return TokenColumns(found, plan.window_of, windows=plan.table, plan=plan.digest)


def changed(plan: WindowPlan, changes: dict[int, float], column: str = "logprob") -> TokenColumns:
    values = np.full(plan.n_targets, -1.0 if column == "logprob" else 0.0, np.float32)
    for index, value in changes.items():
        values[index] = value
    return columns(plan, **{column: values})


def test_positions_are_those_of_the_tokens_that_changed() -> None:
    plan = plan_of()
    first = [window.score_from for window in plan.windows]
    mine = changed(plan, {0: -3.0, 99: -4.0, plan.n_targets - 1: -2.0})
    found = most_diverging(mine, columns(plan), IDS, "ln_ratio", 3)
    assert [one.position for one in found] == [plan.windows[1].score_from, first[0], 399]
    assert [one.token for one in found] == [1000 + one.position for one in found]
    assert [one.window for one in found] == [1, 0, 3]
    assert [one.ln_ratio for one in found] == pytest.approx([3.0, 2.0, 1.0])
    assert found[0].p == pytest.approx(np.exp(-1)) and found[0].delta_p == pytest.approx(
        np.exp(-4) - np.exp(-1)
    )


def test_context_is_of_the_tokens_own_window() -> None:
    plan = plan_of()
    index = 99 + 3  # the fourth target of the second window, which starts at 100
    (one,) = most_diverging(changed(plan, {index: -9.0}), columns(plan), IDS, "delta_p", 1)
    start = plan.windows[1].start
    assert one.before == tuple(range(1000 + start, 1000 + one.position))
    (far,) = most_diverging(changed(plan, {50: -9.0}), columns(plan), IDS, "delta_p", 1)
    assert far.before == tuple(range(1000 + far.position - CONTEXT_TOKENS, 1000 + far.position))


def test_by_each_quantity_the_largest_comes_first_to_either_side() -> None:
    plan = plan_of()
    mine = changed(plan, {5: -0.1, 9: -12.0})  # p up by 0.54; p down by 0.37 and ln ratio 11
    assert [one.position for one in most_diverging(mine, columns(plan), IDS, "delta_p", 2)] == [6, 10]
    assert [one.position for one in most_diverging(mine, columns(plan), IDS, "ln_ratio", 2)] == [10, 6]
    kld = np.zeros(plan.n_targets, np.float32)
    kld[[20, 30, 40]] = [0.5, np.inf, np.nan]
    diverging = columns(plan, kld=kld)
    assert quantities(diverging) == ("kld", "delta_p", "ln_ratio") and "kld" not in quantities(mine)
    found = most_diverging(diverging, columns(plan), IDS, "kld", 3)
    assert [(one.position, one.kld) for one in found[:2]] == [(31, np.inf), (21, 0.5)]
    assert 41 not in [one.position for one in most_diverging(diverging, columns(plan), IDS, "kld", 10**6)]


def test_a_token_of_several_windows_is_there_once_where_it_is_worst() -> None:
    plan = plan_of("exllamav3", 100, 50)
    places = [place for window in plan.windows for place in range(window.score_from, window.end)]
    position = plan.windows[0].end - 1
    here = [i for i, place in enumerate(places) if place == position]
    assert len(here) == 2
    mine = changed(plan, {here[0]: -3.0, here[1]: -5.0})
    found = most_diverging(mine, columns(plan), IDS, "ln_ratio", 2)
    assert found[0].position == position and found[0].window == plan.window_of[here[1]] == 1
    assert found[1].position != position


def test_guesses_are_those_that_were_kept() -> None:
    plan = plan_of()
    argmax = np.arange(plan.n_targets, dtype=np.int32)
    mine, theirs = columns(plan, argmax=argmax), columns(plan, argmax=argmax + 7)
    (one,) = most_diverging(mine, theirs, IDS, "delta_p", 1)
    assert (one.reference_guess, one.model_guess) == (7, 0)
    (one,) = most_diverging(columns(plan), theirs, IDS, "delta_p", 1)
    assert (one.reference_guess, one.model_guess) == (7, None)


def test_results_that_do_not_fit_are_refused() -> None:
    plan, other = plan_of(), plan_of(eval_len=50, stride=50)
    with pytest.raises(StoreError, match="other tokens"):
        most_diverging(columns(plan), columns(other), IDS, "delta_p", 1)
    with pytest.raises(StoreError, match="other tokens"):
        most_diverging(columns(plan), columns(plan), IDS[:300], "delta_p", 1)
    old = TokenColumns(columns(plan).columns, plan.window_of)
    with pytest.raises(StoreError, match=r"evalq 0\.1"):
        most_diverging(old, old, IDS, "delta_p", 1)
    crooked = TokenColumns(columns(plan).columns, plan.window_of[::-1].copy(), windows=plan.table)
    with pytest.raises(StoreError, match="contradict"):
        most_diverging(crooked, columns(plan), IDS, "delta_p", 1)


def test_places_of_tokens_that_count_are_those_in_the_text() -> None:
    plan = plan_of()
    mask = np.zeros(plan.n_targets, bool)
    mask[[3, 7, 99, plan.n_targets - 1]] = True
    mine = replace(changed(plan, {7: -5.0, 50: -9.0, plan.n_targets - 1: -3.0}), mask=mask).counted
    theirs = replace(columns(plan), mask=mask).counted
    found = most_diverging(mine, theirs, IDS, "ln_ratio", 2)
    assert [one.position for one in found] == [8, 399]
    assert [one.token for one in found] == [1008, 1399] and found[0].before == tuple(range(1000, 1008))
