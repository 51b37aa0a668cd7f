"""The spelling of a KV cache: types, pairs, bits, steps, and what engines refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from evalq.engine.kv_cache import BITS, CacheTypes, KvCache, cache_of, parse, step_bounds, step_tokens
from evalq.engine.registry import resolve_engine
from evalq.errors import SpecError
from evalq.spec import load_model_specs

SOME = CacheTypes("engine", ("fp16", "q8_0", "q4_0"))
ONE = CacheTypes("engine", ("bf16", "fp8"), alike=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("auto", None),
        (" AUTO ", None),
        ("q8_0", KvCache("q8_0", "q8_0")),
        ("q8_0/q4_0", KvCache("q8_0", "q4_0")),
        ("F16", KvCache("fp16", "fp16")),
        ("fp8_e4m3", KvCache("fp8", "fp8")),
        ("8/4", KvCache("8", "4")),
        ("fp16/q4_0", KvCache("fp16", "q4_0")),
    ],
)
def test_spelling(text: str, found: KvCache | None) -> None:
    assert parse(text) == found


@pytest.mark.parametrize(
    "text", ["", "q3_0", "q8_0/", "/q8_0", "q8_0/q8_0/q8_0", "9", "1", "auto/q8_0", "8,4"]
)
def test_what_is_no_type(text: str) -> None:
    with pytest.raises(ValueError, match="is no type of KV cache"):
        parse(text)


def test_bits_hold_the_scales() -> None:
    """A block of 32 at b bits and s bytes of scales has b + s / 4 bits for each element."""
    assert [BITS[name] for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")] == [
        8 + 2 / 4, 5 + 4 / 4, 5 + 2 / 4, 4 + 4 / 4, 4 + 2 / 4,
    ]  # fmt: skip
    assert [BITS[str(bits)] for bits in (8, 4, 2)] == [8.5, 4.5, 2.5]
    apart = KvCache("q8_0", "q4_0")
    assert (apart.k_bits, apart.v_bits, apart.bits, str(apart)) == (8.5, 4.5, 6.5, "q8_0/q4_0")
    assert apart.quantized and not KvCache("fp16", "bf16").quantized and KvCache("fp16", "fp8").quantized


@pytest.mark.parametrize(("text", "kept"), [("auto", None), ("q8_0/q8_0", "q8_0"), ("F16/Q4_0", "fp16/q4_0")])
def test_identities_hold_one_spelling(text: str, kept: str | None) -> None:
    assert SOME.canonical(text) == kept


@pytest.mark.parametrize(
    ("types", "text", "words"),
    [
        (SOME, "q5_0", "engine has no KV cache of type q5_0; it has auto, fp16, q8_0, q4_0; keys and values"),
        (SOME, "q3", '"q3" is no type of KV cache; engine has auto, fp16, q8_0, q4_0; keys and values apart'),
        (SOME, "q8_0/fp8", "engine has no KV cache of type fp8; it has auto, fp16"),
        (ONE, "fp8/bf16", "engine stores keys and values in one type; it has auto, bf16, fp8"),
    ],
)
def test_a_type_that_an_engine_lacks_is_refused_with_those_it_has(
    types: CacheTypes, text: str, words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        types.canonical(text)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_only_a_named_cache_is_scored_in_steps() -> None:
    assert step_tokens({}) is None and step_tokens({"n_batch": 64}) is None
    assert step_tokens({"kv_cache": "q8_0"}) == step_tokens({"kv_cache": "fp16"}) == 512


@pytest.mark.parametrize(
    ("n", "most"), [(1, 512), (511, 512), (2047, 512), (2048, 512), (2049, 512), (65, 64)]
)
def test_steps_cover_a_window_once_in_equal_parts(n: int, most: int) -> None:
    bounds = step_bounds(n, most)
    sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    assert bounds[0] == 0 and bounds[-1] == n and max(sizes) <= most and max(sizes) - min(sizes) <= 1


def spec_file(tmp_path: Path, engine: str, cache: Any, **more: Any) -> Path:
    file = tmp_path / "m.json"
    raw = {"load_fn": engine, "model_dir": "/m/x", "options": {"kv_cache": cache} | more}
    file.write_text(json.dumps(raw))
    return file


def test_auto_is_what_no_option_is(tmp_path: Path) -> None:
    (spec,) = load_model_specs(spec_file(tmp_path, "gguf", "auto"))
    engine = resolve_engine(spec)
    assert engine.options == {} and engine.numeric_options == {} and engine.kv_cache is None
    assert spec.plain_label == "x"


def test_a_type_is_part_of_the_identity(tmp_path: Path) -> None:
    (spec,) = load_model_specs(spec_file(tmp_path, "gguf", "Q8_0/q8_0"))
    engine = resolve_engine(spec)
    assert engine.numeric_options == {"kv_cache": "q8_0"} and cache_of(engine.options) == parse("q8_0")


@pytest.mark.parametrize(
    ("engine", "cache", "words"),
    [
        ("gguf", "fp8", "llama.cpp has no KV cache of type fp8; it has auto, f32, fp16, bf16, q8_0"),
        ("gguf", "4", "llama.cpp has no KV cache of type 4; it has auto, f32"),
        ("gguf", "q2_k", '"q2_k" is no type of KV cache; llama.cpp has auto, f32'),
        ("gguf", 8, "should be str, not 8"),
        ("server", "fp8", "unknown option"),
    ],
)
def test_what_an_engine_lacks_is_said_before_anything_starts(
    tmp_path: Path, engine: str, cache: Any, words: str
) -> None:
    (spec,) = load_model_specs(spec_file(tmp_path, engine, cache))
    with pytest.raises(SpecError) as caught:
        resolve_engine(spec)
    assert words in str(caught.value) and "m.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "cache", "shown"),
    [
        (None, "q8_0", "x kv q8_0"),
        ("Q4_K_M [red]", "q8_0/q4_0", "Q4_K_M kv q8_0/q4_0"),
        ("Q4_K_M KV4 [red]", "q4_0", "Q4_K_M KV4"),
        ("Q4_K_M, 4-bit cache", "q4_0", "Q4_K_M, 4-bit cache"),
        ("q8_0", "q8_0", "q8_0 kv q8_0"),
        ("Q4_K_M", "auto", "Q4_K_M"),
    ],
)
def test_the_label_says_it(tmp_path: Path, label: str | None, cache: str, shown: str) -> None:
    raw = {"load_fn": "gguf", "model_dir": "/m/x", "label": label, "options": {"kv_cache": cache}}
    (tmp_path / "m.json").write_text(json.dumps(raw))
    (spec,) = load_model_specs(tmp_path / "m.json")
    assert spec.plain_label == shown
