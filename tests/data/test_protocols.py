"""What each protocol scores: known counts, and properties over random streams.

The brute-force definitions list targets and contexts token by token, from the tools' descriptions and without
windows, so an off-by-one in the builders cannot hide in both.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_cases import (
    BOS,
    FILE_N,
    JOINED_N,
    document_sizes,
    documents_plan,
    facts,
    inputs,
    lengths,
    plan,
    scored,
)

from evalq.data.windows import PROTOCOLS, ProtocolSettings, plan_windows, positions_of
from evalq.errors import DataError

# --- known counts -----------------------------------------------------------------------------------------


def test_published_setups_on_wikitext2_have_their_known_sizes():
    counted = {}
    for name, n, length, stride, rows in [
        ("exllamav3", JOINED_N, 2048, 512, 20),
        ("qbench", JOINED_N, 2048, None, 100),
        ("hf-strided", JOINED_N, 2048, 512, None),
        ("gptq", JOINED_N, 2048, None, None),
        ("llama.cpp", FILE_N, 512, None, None),
        ("llama.cpp", FILE_N, 2048, None, None),
    ]:
        built = plan(name, n, length, stride, max_rows=rows)
        counted[name, length] = len(built.windows), built.n_targets, built.overlapping
    assert counted == {
        ("exllamav3", 2048): (20, 40_940, True),
        ("qbench", 2048): (100, 204_700, False),
        ("hf-strided", 2048): (593, JOINED_N - 1, True),
        ("gptq", 2048): (148, 148 * 2047, False),
        ("llama.cpp", 512): (592, 592 * 255, False),
        ("llama.cpp", 2048): (148, 148 * 1023, False),
    }


def test_protocol_defaults_are_those_of_the_tools():
    defaults = {name: (p.default_eval_len, p.default_eval_stride, p.text) for name, p in PROTOCOLS.items()}
    assert defaults == {
        "exllamav3": (2048, 512, "joined"),
        "qbench": (2048, None, "joined-nonblank"),
        "hf-strided": (2048, 512, "joined"),
        "gptq": (2048, None, "joined"),
        "llama.cpp": (512, None, "file"),
        "lm-eval": (2048, None, "documents"),
        "long": (8192, None, "joined"),
        "chat": (4096, None, "conversations"),
    }
    assert {name for name, p in PROTOCOLS.items() if p.unit == "word"} == {"lm-eval"}
    assert all(p.source.startswith("https://") and p.help for p in PROTOCOLS.values())


@pytest.mark.parametrize(("name", "stride"), [("exllamav3", 512), ("hf-strided", 512), ("qbench", 2048)])
def test_an_unset_stride_is_the_protocols_own(name, stride):
    assert plan(name, 9000, 2048).windows[1].start == stride
    assert plan(name, 9000, 100).windows[1].start == 100, "never longer than the window"


def test_lm_eval_by_hand():
    """M = 4; documents of 10, 4, 0 and 2 tokens. The last window of the first has a long context."""
    built = documents_plan([10, 4, 0, 2], 4)
    assert inputs(built, 16) == [
        [BOS, 0, 1, 2, 3],
        [3, 4, 5, 6, 7],
        [5, 6, 7, 8, 9],
        [BOS, 10, 11, 12, 13],
        [BOS, 14, 15],
    ]
    assert [w.first_target(1) for w in built.windows] == [1, 1, 3, 1, 1]
    assert built.longest_tokens == 5 and built.n_targets == 16
    assert built.batches(8) == [[0, 1], [2], [3], [4]]


# --- definitions written without windows --------------------------------------------------------------------


def brute_sliding(n: int, length: int, stride: int, warmup: int = 0) -> list[tuple[int, list[int]]]:
    result, start = [], 0
    while start + length < n:
        for offset in range(1 + warmup, length):
            result.append((start + offset, [start + k for k in range(offset)]))
        start += stride
    return result


def brute_strided(n: int, length: int, stride: int) -> list[tuple[int, list[int]]]:
    """Each token by the first window that holds it: the smallest multiple of S that reaches it."""
    result = []
    for token in range(1, n):
        start = 0
        while start + length <= token:
            start += stride
        if start < token:
            result.append((token, list(range(start, token))))
    return result


def brute_disjoint(n: int, length: int, skipped: int) -> list[tuple[int, list[int]]]:
    whole = n - n % length
    return [(t, list(range(t - t % length, t))) for t in range(whole) if t % length > skipped]


def brute_rolling(sizes: list[int], longest: int) -> list[tuple[int, list[int]]]:
    """Token i of a document of n: block i // M gives one token of context, or the whole last M + 1 tokens."""
    result, begin = [], 0
    for n in sizes:
        for i in range(n):
            block = i // longest
            if block == 0:
                context = [BOS, *range(begin, begin + i)]
            else:
                stop = min((block + 1) * longest, n)
                context = list(range(begin + stop - longest - 1, begin + i))
            result.append((begin + i, context))
        begin += n
    return result


@given(lengths(), st.integers(0, 12))
def test_exllamav3_and_qbench_score_what_their_description_says(sizes, warmup):
    n, length, stride = sizes
    warmup = min(warmup, length - 2)
    expected = brute_sliding(n, length, stride, warmup)
    for name in ("exllamav3", "qbench"):
        if not expected:
            with pytest.raises(DataError, match=f"text has {n} tokens"):
                plan(name, n, length, stride, warmup_tokens=warmup)
        else:
            assert scored(plan(name, n, length, stride, warmup_tokens=warmup), n) == expected


@given(lengths())
def test_exllamav3_scores_an_inner_token_in_every_window_that_holds_it(sizes):
    n, length, _ = sizes
    stride = max(1, length // 2)
    if n <= length:
        return
    built = plan("exllamav3", n, length, stride)
    times = Counter(target for target, _ in scored(built, n))
    starts = [w.start for w in built.windows]
    assert times == Counter({t: sum(s < t < s + length for s in starts) for t in range(n)}) - Counter()
    assert built.windows[-1].end < n, "a last window that fits exactly is left out"


@given(lengths())
def test_hf_strided_scores_every_token_but_the_first_exactly_once(sizes):
    n, length, stride = sizes
    if n < 2 or stride > length:
        return
    built = plan("hf-strided", n, length, stride)
    assert scored(built, n) == brute_strided(n, length, stride)
    times = Counter(target for target, _ in scored(built, n))
    assert set(times.values()) == {1}
    if stride < length:
        assert times.keys() == set(range(1, n))
    else:
        assert times.keys() == {t for t in range(n) if t % length}, (
            "S = L: a window's first token has no context"
        )


@given(lengths(smallest=3))
def test_gptq_and_llama_cpp_score_what_their_description_says(sizes):
    n, length, _ = sizes
    if n >= length:
        assert scored(plan("gptq", n, length), n) == brute_disjoint(n, length, 0)
    if n >= 2 * length:
        assert scored(plan("llama.cpp", n, length, bos="never"), n) == brute_disjoint(n, length, length // 2)


def brute_long(sizes: list[int], length: int) -> list[tuple[int, list[int]]]:
    """A token has those before it in its block of L of its document; the first of a block is not scored."""
    result, begin = [], 0
    for n in sizes:
        for i in range(n):
            if i % length:
                result.append((begin + i, list(range(begin + i - i % length, begin + i))))
        begin += n
    return result


@given(document_sizes, st.integers(2, 12))
def test_long_scores_every_document_to_its_end(sizes, length):
    settings_, n = ProtocolSettings("long", length), sum(sizes)
    given_facts = facts(n, tuple(int(end) for end in np.cumsum(sizes)))
    if expected := brute_long(sizes, length):
        built = plan_windows(settings_, given_facts)
        assert scored(built, n) == expected
        assert built.longest_tokens <= length
        assert np.array_equal(positions_of(built.table), [len(context) for _, context in expected])
    else:
        with pytest.raises(DataError):
            plan_windows(settings_, given_facts)


def test_long_scores_a_text_that_is_shorter_than_a_window():
    assert [(w.start, w.end) for w in plan("long", 5000, 8192).windows] == [(0, 5000)]
    assert [(w.start, w.end) for w in plan("long", 20_000, 8192).windows][-1] == (16_384, 20_000)


def test_long_begins_every_window_as_the_tokenizer_begins_a_text():
    settings_ = ProtocolSettings("long", 4)
    with_bos = plan_windows(settings_, facts(8, adds_bos=True))
    assert inputs(with_bos, 8) == [[BOS, 1, 2, 3], [BOS, 5, 6, 7]]
    assert inputs(plan_windows(settings_, facts(8, adds_bos=False)), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(document_sizes, st.integers(2, 12))
def test_lm_eval_scores_what_its_description_says(sizes, longest):
    built = documents_plan(sizes, longest)
    assert scored(built, sum(sizes)) == brute_rolling(sizes, longest)
    assert built.longest_tokens <= longest + 1


@given(document_sizes, st.integers(2, 12), st.integers(1, 6))
def test_lm_eval_max_rows_counts_documents(sizes, longest, rows):
    if not any(sizes[:rows]):
        with pytest.raises(DataError, match="documents are empty"):
            documents_plan(sizes, longest, max_rows=rows)
        return
    assert documents_plan(sizes, longest, max_rows=rows).n_targets == sum(sizes[:rows])


@given(document_sizes, st.integers(2, 12))
def test_no_window_crosses_a_document(sizes, longest):
    ends = np.cumsum(sizes)
    for window in documents_plan(sizes, longest).windows:
        assert np.searchsorted(ends, window.start, side="right") == np.searchsorted(
            ends, window.end - 1, "right"
        )


def masks(n: int):
    return st.lists(st.booleans(), min_size=n, max_size=n).map(lambda bits: np.array(bits, bool))


@given(document_sizes, st.integers(3, 50), st.data())
def test_chat_scores_what_its_description_says(sizes, longest, data):
    """By hand: a document a window from its start, cut at L, first target to last that count."""
    mask = data.draw(masks(sum(sizes)))
    expected, counted, begin = [], [], 0
    for size in sizes:
        end = begin + min(size, longest)
        places = [t for t in range(begin + 1, end) if mask[t]]
        if places:
            targets = range(places[0], places[-1] + 1)
            expected += [(t, list(range(begin, t))) for t in targets]
            counted += [bool(mask[t]) for t in targets]
        begin += size
    if not expected:
        with pytest.raises(DataError, match="no token to score|text has"):
            documents_plan(sizes, longest, "chat", mask)
        return
    built = documents_plan(sizes, longest, "chat", mask)
    assert scored(built, sum(sizes)) == expected
    assert built.n_counted == sum(counted) and built.n_targets == len(counted)
    assert (np.ones(len(counted), bool) if built.mask is None else built.mask).tolist() == counted
    assert not built.overlapping and np.unique(built.cluster_of).size == len(built.windows)
