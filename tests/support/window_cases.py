"""Streams and plans shared by the tests of protocols and windows.

`scored(plan)` lists (target position, context positions) of every target in plan order, which is all that a
perplexity depends on.
"""

import numpy as np
from hypothesis import strategies as st

from evalq.data.windows import PROTOCOLS, ProtocolSettings, StreamFacts, WindowPlan, plan_windows

BOS, EOS = 9001, 9002
DOCUMENT_PROTOCOLS = ("lm-eval", "chat")
STREAM_PROTOCOLS = [name for name in PROTOCOLS if name not in DOCUMENT_PROTOCOLS]
# SmolLM2's tokenizer on the WikiText-2 test split: rows joined, and the file's own text.
JOINED_N, FILE_N = 304_986, 303_415


def facts(n: int, ends: tuple[int, ...] = (), **special) -> StreamFacts:
    return StreamFacts(n, ends, **({"bos_id": BOS, "eos_id": EOS} | special))


def plan(name: str, n: int, length: int, stride: int | None = None, **settings) -> WindowPlan:
    return plan_windows(ProtocolSettings(name, length, stride, **settings), facts(n))


def documents_plan(
    sizes: list[int], longest: int, name: str = "lm-eval", mask: np.ndarray | None = None, **settings
) -> WindowPlan:
    ends = tuple(int(end) for end in np.cumsum(sizes))
    return plan_windows(ProtocolSettings(name, longest, **settings), facts(ends[-1], ends), mask)


def inputs(plan: WindowPlan, n: int) -> list[list[int]]:
    """Each window's ids for the stream 0, 1, 2, ..., where an id is its own stream position."""
    stream = np.arange(n, dtype=np.int64)
    return [window.ids(stream, np.array(plan.prefix)).tolist() for window in plan.windows]


def scored(plan: WindowPlan, n: int) -> list[tuple[int, list[int]]]:
    """(target, context) of every target, read off the ids that a backend would get."""
    result = []
    for window, ids in zip(plan.windows, inputs(plan, n), strict=True):
        first = window.first_target(len(plan.prefix))
        result += [(ids[i], ids[:i]) for i in range(first, len(ids))]
    return result


@st.composite
def lengths(draw, smallest: int = 2) -> tuple[int, int, int]:
    """(N, L, S) with a text of a few windows and any overlap, S > L too."""
    length = draw(st.integers(smallest, 14))
    return draw(st.integers(1, 70)), length, draw(st.integers(1, length + 3))


document_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
