"""Which windows are taken in steps."""

import pytest

from evalq.data.windows import ProtocolSettings, StreamFacts, WindowPlan, plan_windows
from evalq.engine import kv_cache
from evalq.run.steps import LONG_STEP_TOKENS, SMALL_STEP_TOKENS, step_tokens


def plan(length: int, name: str = "long") -> WindowPlan:
    return plan_windows(ProtocolSettings(name, length), StreamFacts(3 * length))


@pytest.mark.parametrize(
    ("plans", "divide_work", "expected"),
    [
        ([plan(8192)], 1, None),
        ([plan(LONG_STEP_TOKENS + 1)], 1, None),  # the last token is a target only
        ([plan(LONG_STEP_TOKENS + 2)], 1, LONG_STEP_TOKENS),
        ([plan(32768)], 1, LONG_STEP_TOKENS),
        ([plan(2048, "gptq"), plan(32768)], 1, LONG_STEP_TOKENS),
        ([plan(32768, "gptq"), plan(2048)], 1, None),  # as before there were steps
        ([plan(8192)], 2, SMALL_STEP_TOKENS),
        ([plan(1024)], 2, None),
        ([plan(8192, "gptq")], 2, None),
    ],
)
def test_long_windows_are_taken_in_steps(
    plans: list[WindowPlan], divide_work: int, expected: int | None
) -> None:
    assert step_tokens({}, plans, divide_work) == expected


def test_a_cache_that_is_measured_asks_for_smaller_steps() -> None:
    options = {"kv_cache": "q8_0"}
    assert step_tokens(options, [plan(2048, "gptq")]) == kv_cache.STEP_TOKENS
    assert step_tokens(options, [plan(32768)]) == kv_cache.STEP_TOKENS < LONG_STEP_TOKENS
