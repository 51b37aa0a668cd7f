"""What holds for every plan: bounds, batches, BOS and prefixes, and refusals."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_cases import (
    BOS,
    DOCUMENT_PROTOCOLS,
    EOS,
    STREAM_PROTOCOLS,
    document_sizes,
    documents_plan,
    facts,
    inputs,
    plan,
    scored,
)

from evalq.data.windows import (
    PROTOCOLS,
    ProtocolSettings,
    Window,
    WindowPlan,
    least_clusters,
    plan_windows,
    stream_special_tokens,
    stretches,
)
from evalq.errors import DataError, SpecError

# --- what holds for all -----------------------------------------------------------------------------------


@st.composite
def plans(draw) -> tuple[WindowPlan, int]:
    """A plan of any protocol with any BOS policy, and its N."""
    name = draw(st.sampled_from(list(PROTOCOLS)))
    length = draw(st.integers(3, 12))
    if name in DOCUMENT_PROTOCOLS:
        sizes = draw(document_sizes.filter(lambda sizes: max(sizes) > 1))
        return documents_plan(sizes, length, name), sum(sizes)
    n = draw(st.integers(2 * length, 80))
    free = name in ("exllamav3", "qbench", "hf-strided")
    stride = draw(st.integers(1, length)) if free else None
    bos = draw(st.sampled_from(["default", "never", "every_window"]))
    prefix = draw(st.lists(st.integers(1000, 1005), max_size=3)) if bos != "every_window" else []
    rows = draw(st.sampled_from([None, 0, 1])) if name == "qbench" else draw(st.sampled_from([None, 0, 1, 3]))
    settings_ = ProtocolSettings(name, length, stride, rows, bos, prefix_ids=tuple(prefix))
    return plan_windows(settings_, facts(n)), n


@given(plans())
def test_every_window_stays_in_bounds_and_ids_match_first_target(case):
    built, n = case
    prefix_len = len(built.prefix)
    for window, ids in zip(built.windows, inputs(built, n), strict=True):
        assert 0 <= window.start <= window.score_from < window.end <= n
        assert window.first_target(prefix_len) >= 1
        assert len(ids) == window.n_ids(prefix_len) <= built.longest_tokens
        assert len(ids) - window.first_target(prefix_len) == window.n_targets
        assert ids[window.first_target(prefix_len) :] == list(range(window.score_from, window.end))
    assert built.n_targets == len(scored(built, n))


@given(plans(), st.integers(1, 5))
def test_batches_partition_the_windows_into_equal_shapes(case, batch_windows):
    built, n = case
    batches = built.batches(batch_windows)
    assert [i for batch in batches for i in batch] == list(range(len(built.windows)))
    assert all(1 <= len(batch) <= batch_windows for batch in batches)
    shapes = [
        {(len(inputs(built, n)[i]), built.windows[i].first_target(len(built.prefix))) for i in b}
        for b in batches
    ]
    assert all(len(shape) == 1 for shape in shapes)
    for left, right, shape_left, shape_right in zip(batches, batches[1:], shapes, shapes[1:], strict=False):
        assert len(left) == batch_windows or shape_left != shape_right, (
            f"{left} and {right} could be one batch"
        )


@given(plans())
def test_overlapping_says_whether_windows_share_more_than_one_token(case):
    built, _ = case
    held = Counter(t for w in built.windows for t in range(w.start, w.end))
    shares = [
        len(set(range(a.start, a.end)) & set(range(b.start, b.end)))
        for a, b in zip(built.windows, built.windows[1:], strict=False)
    ]
    assert built.overlapping == any(share > 1 for share in shares)
    if not built.overlapping:
        assert max(held.values()) <= 2


@given(plans())
def test_windows_side_by_side_are_clusters_and_overlapping_ones_share_stretches_of_text(case):
    built, _ = case
    found = built.cluster_of
    assert found.size == built.n_targets and found.min() >= 0
    if not built.overlapping and least_clusters(built.protocol) <= len(built.windows):
        assert np.array_equal(found, built.window_of)
    if not built.overlapping:
        return
    position = np.concatenate([np.arange(w.score_from, w.end) for w in built.windows])
    stretches = [position[found == name] for name in range(found.max() + 1)]
    # Each token of the text is in one stretch, in whatever window it is scored; stretches do not mix.
    assert all(before.max() < after.min() for before, after in zip(stretches, stretches[1:], strict=False))
    longest = max(w.end - w.start for w in built.windows)
    text = built.windows[-1].end - min(w.start for w in built.windows)
    assert len(stretches) <= max(1, text // longest)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 20))
def test_stretches_are_equal_parts_of_one_window_and_no_more_than_it_takes(sizes, least):
    window_of = np.repeat(np.arange(len(sizes)) * 3, sizes)
    found = stretches(window_of, least)
    assert np.all(np.diff(found) >= 0) and found.size == window_of.size
    each = math.ceil(least / len(sizes))
    for name, size in zip(np.arange(len(sizes)) * 3, sizes, strict=True):
        parts = np.unique(found[window_of == name], return_counts=True)[1]
        assert len(parts) == min(each, size) and parts.max() - parts.min() <= 1
    assert len(np.unique(found)) == sum(min(each, size) for size in sizes), "no stretch crosses windows"


@pytest.mark.parametrize(("n", "expected"), [(8192, 8), (2 * 8192, 8), (3 * 8192, 9), (9 * 8192, 9)])
def test_few_long_windows_are_cut_until_there_are_enough_clusters(n, expected):
    assert len(np.unique(plan("long", n, 8192).cluster_of)) == expected
    gptq = plan("gptq", n, 8192)
    assert np.array_equal(gptq.cluster_of, gptq.window_of), "errors of other protocols stay what they were"


def test_as_many_stretches_as_windows_side_by_side():
    """20 windows of 2048 every 512 tokens: 11,776 tokens of text, which is 5.75 windows."""
    built = plan("exllamav3", 19 * 512 + 2048 + 1, 2048, 512)
    assert len(built.windows) == 20
    sizes = np.bincount(built.cluster_of)
    assert len(sizes) == 5 and sizes.sum() == 20 * 2047 and sizes.max() < 2 * sizes.min()


@pytest.mark.parametrize("rows", [None, 0])
@pytest.mark.parametrize("name", STREAM_PROTOCOLS)
def test_max_rows_takes_the_first_windows(name, rows):
    every = plan(name, 100, 10, max_rows=rows).windows
    assert plan(name, 100, 10, max_rows=3).windows == every[:3] and len(every) >= 9


def test_ids_are_a_fresh_int64_array():
    stream = np.arange(6, dtype=np.int64)
    Window(0, 4, 1, "overwrite").ids(stream, np.array([BOS]))
    assert stream.tolist() == [0, 1, 2, 3, 4, 5], "overwriting must not write into the stream"
    assert Window(1, 4, 2).ids(stream.astype(np.int32), np.array([], np.int64)).dtype == np.int64


# --- BOS and prefixes ---------------------------------------------------------------------------------------


def test_llama_cpp_overwrites_with_bos_only_if_the_vocabulary_adds_it():
    settings_ = ProtocolSettings("llama.cpp", 4)
    with_bos = plan_windows(settings_, facts(8, adds_bos=True))
    assert inputs(with_bos, 8) == [[BOS, 1, 2, 3], [BOS, 5, 6, 7]]
    assert inputs(plan_windows(settings_, facts(8, adds_bos=False)), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    never = ProtocolSettings("llama.cpp", 4, bos="never")
    assert plan_windows(never, facts(8, adds_bos=True)).prefix == ()


@pytest.mark.parametrize("name", STREAM_PROTOCOLS)
def test_bos_in_every_window_replaces_context_only(name):
    plain, with_bos = plan(name, 40, 8), plan(name, 40, 8, bos="every_window")
    assert [ids[0] for ids in inputs(with_bos, 40)] == [BOS] * len(with_bos.windows)
    assert [t for t, _ in scored(with_bos, 40)] == [t for t, _ in scored(plain, 40)]
    assert with_bos.longest_tokens == plain.longest_tokens


@pytest.mark.parametrize("name", STREAM_PROTOCOLS)
def test_a_prefix_is_context_and_shifts_no_target(name):
    plain, prefixed = plan(name, 40, 8), plan(name, 40, 8, prefix_ids=(70, 71, 72))
    assert all(ids[:3] == [70, 71, 72] for ids in inputs(prefixed, 40))
    assert scored(prefixed, 40) == [(t, [70, 71, 72, *context]) for t, context in scored(plain, 40)]
    assert prefixed.longest_tokens == 11


def test_lm_eval_takes_eos_where_there_is_no_bos():
    settings_ = ProtocolSettings("lm-eval", 4)
    assert plan_windows(settings_, facts(5, bos_id=None)).prefix == (EOS,)
    assert plan_windows(settings_, facts(5, bos_id=0)).prefix == (0,), "id 0 is a BOS like any other"
    with pytest.raises(SpecError, match="neither BOS nor EOS"):
        plan_windows(settings_, facts(5, bos_id=None, eos_id=None))


def test_which_protocols_let_the_tokenizer_add_special_tokens():
    adds = {
        (name, bos)
        for name in PROTOCOLS
        for bos in ("default", "never", "every_window")
        if stream_special_tokens(name, bos)
    }
    whole_stream = ["exllamav3", "hf-strided", "gptq", "llama.cpp", "long"]
    assert adds == {(name, bos) for name in whole_stream for bos in ("default", "every_window")}


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (ProtocolSettings("exlamav3", 8), 'unknown protocol "exlamav3" .*did you mean "exllamav3"'),
        (ProtocolSettings("ppl", 8), "known: exllamav3, qbench, hf-strided, gptq, llama.cpp, lm-eval, long"),
        (ProtocolSettings("exllamav3", 1), "eval_len is 1"),
        (ProtocolSettings("llama.cpp", 2), "llama.cpp needs 3 or more"),
        (ProtocolSettings("exllamav3", 8, 0), "eval_stride is 0"),
        (ProtocolSettings("exllamav3", 8, -4), "eval_stride is -4"),
        (ProtocolSettings("hf-strided", 8, 9), "eval_stride 9 is longer than eval_len 8"),
        (ProtocolSettings("gptq", 8, 4), "gptq has no eval_stride other than eval_len"),
        (ProtocolSettings("llama.cpp", 8, 4), "llama.cpp has no eval_stride other than eval_len"),
        (ProtocolSettings("long", 8, 4), "long has no eval_stride other than eval_len"),
        (ProtocolSettings("lm-eval", 8, 4), "lm-eval has no eval_stride other than eval_len"),
        (ProtocolSettings("exllamav3", 8, max_rows=-1), "max_rows is -1"),
        (ProtocolSettings("exllamav3", 8, warmup_tokens=7), "warmup_tokens is 7 .0 to 6"),
        (ProtocolSettings("exllamav3", 8, warmup_tokens=-1), "warmup_tokens is -1"),
        (ProtocolSettings("gptq", 8, warmup_tokens=2), "gptq has no warmup_tokens"),
        (ProtocolSettings("lm-eval", 8, bos="never"), 'its own prefix .* bos "never"'),
        (ProtocolSettings("lm-eval", 8, bos="every_window"), 'its own prefix .* bos "every_window"'),
        (ProtocolSettings("lm-eval", 8, prefix_ids=(1,)), "its own prefix .* prefix_ids"),
        (ProtocolSettings("gptq", 8, bos="every_window", prefix_ids=(1,)), "BOS would overwrite"),
    ],
)
def test_impossible_settings_are_refused(settings_, message):
    with pytest.raises(SpecError, match=message):
        plan_windows(settings_, facts(100))


def test_bos_in_every_window_needs_a_bos():
    with pytest.raises(SpecError, match="no BOS token"):
        plan_windows(ProtocolSettings("gptq", 8, bos="every_window"), facts(100, bos_id=None))


def test_a_stride_equal_to_the_window_is_no_stride():
    assert plan("gptq", 100, 8, 8) == plan("gptq", 100, 8)


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("exllamav3", 7, "text has 7 tokens, shorter than a window of 8"),
        ("exllamav3", 8, "exllamav3 with eval_len 8 needs 9"),
        ("gptq", 7, "shorter than a window of 8"),
        ("llama.cpp", 15, "llama.cpp with eval_len 8 needs 16"),
        ("hf-strided", 1, "text has 1 tokens, shorter"),
        ("lm-eval", 0, "text has 0 tokens, shorter"),
    ],
)
def test_a_text_that_is_too_short_is_refused(name, n, message):
    with pytest.raises(DataError, match=message):
        plan(name, n, 8)


@pytest.mark.parametrize(("name", "n"), [("exllamav3", 9), ("gptq", 8), ("llama.cpp", 16), ("hf-strided", 2)])
def test_the_shortest_text_that_is_long_enough(name, n):
    assert plan(name, n, 8).n_targets >= 1


def test_qbench_refuses_fewer_windows_than_asked_for():
    assert len(plan("qbench", 33, 8, max_rows=4).windows) == 4
    with pytest.raises(DataError, match="text has 3 windows of 8 tokens, max_rows is 4"):
        plan("qbench", 32, 8, max_rows=4)


def test_batches_of_nothing_are_refused():
    with pytest.raises(SpecError, match="batch_windows is 0"):
        plan("gptq", 100, 8).batches(0)


# --- which targets count ------------------------------------------------------------------------------------


def test_a_mask_is_part_of_the_digest_only_where_it_leaves_targets_out():
    """Digests of plans without one are those of every store there is."""
    sizes, mask = [6, 5], np.ones(11, bool)
    whole = documents_plan(sizes, 10, "chat")
    assert whole.digest == documents_plan(sizes, 10, "chat", mask).digest
    assert documents_plan(sizes, 10, "chat", mask).mask is None
    middle = mask.copy()
    middle[3] = False
    masked = documents_plan(sizes, 10, "chat", middle)
    assert masked.windows == whole.windows and masked.digest != whole.digest
    assert (masked.n_targets, masked.n_counted) == (9, 8) and masked.mask_digest and not whole.mask_digest
    assert masked.cluster_of.tolist() == [0] * 4 + [1] * 4
    other = mask.copy()
    other[2] = False
    assert documents_plan(sizes, 10, "chat", other).digest != masked.digest


def test_a_window_without_a_target_that_counts_is_none_of_the_rows():
    mask = np.array([0, 0, 0, 0, 1, 0, 0, 0, 1], bool)
    built = documents_plan([3, 3, 3], 3, "chat", mask, max_rows=1)
    assert [(w.start, w.end, w.score_from) for w in built.windows] == [(3, 5, 4)]
    with pytest.raises(DataError, match="no token to score"):
        documents_plan([3, 3, 3], 3, "chat", np.array([1, 0, 0] * 3, bool))


@pytest.mark.parametrize("settings", [{"bos": "never"}, {"bos": "every_window"}, {"prefix_ids": (1,)}])
def test_a_chat_begins_as_its_template_wrote_it(settings):
    with pytest.raises(SpecError, match="chat puts its own prefix"):
        documents_plan([6, 6], 6, "chat", **settings)
