"""Floors: which KLD of a run is an engine's own, and what lies below it."""

from typing import Any

import pytest
from result_records import diverging, record

from evalq.results.floor import at_floor, floor_of, floors, with_floors
from evalq.results.record import ResultRecord


def scored(
    label: str, engine: str, bpw: float, kld: float | None, options: dict[str, Any] | None = None, **more: Any
) -> ResultRecord:
    """A model beside the reference "BF16"; a KLD of None makes it the reference itself."""
    identity = {"engine": engine, "forward": engine, "options": options or {}}
    against = (
        None if kld is None else diverging("BF16", kld, 0.1 * kld, quantized=more.pop("quantized", None))
    )
    return record(
        label, layer_bpw=bpw, engine=engine, identity=identity,
        is_reference=kld is None, against_reference=against, **more,
    )  # fmt: skip


REFERENCE = scored("BF16", "hf", 16.0, None)
IN_VLLM = scored("BF16 vLLM", "vllm", 16.0, 0.002)
NOISE = scored("BF16 noise floor", "hf", 16.0, 0.0004, {"layer_noise": 2**-9})


def known(records: list[ResultRecord]) -> list[tuple[str, str | None, bool]]:
    return [(f.engine, None if f.floor is None else f.floor.label, f.is_references) for f in floors(records)]


def test_the_unquantized_model_in_another_engine_is_that_engines_floor() -> None:
    quant, other = scored("NVFP4", "vllm", 4.5, 0.05), scored("Q4", "gguf", 4.5, 0.04)
    records = [REFERENCE, IN_VLLM, quant, other]
    assert known(records) == [("vllm", "BF16 vLLM", False), ("gguf", None, False)]
    floor = floor_of(quant, records)
    assert floor is not None and floor.kind == "unquantized"
    assert floor.kld.value == 0.002 and floor.kld.stderr == pytest.approx(0.0002)
    assert floor_of(other, records) is None
    assert floor_of(IN_VLLM, records) is None and floor_of(REFERENCE, records) is None


def test_the_references_own_engine_has_a_floor_by_noise_only() -> None:
    quant = scored("INT4", "hf", 4.25, 0.1)
    assert known([REFERENCE, quant]) == [("hf", None, True)]
    assert known([REFERENCE, NOISE, quant]) == [("hf", "BF16 noise floor", True)]
    half = scored("BF16 in half", "hf", 16.0, 0.0001, {"dtype": "float16"})
    assert known([REFERENCE, half, NOISE, quant]) == [("hf", "BF16 noise floor", True)]
    assert known([REFERENCE, half, quant]) == [("hf", "BF16 in half", True)]
    floor = floor_of(quant, [REFERENCE, NOISE, quant])
    assert floor is not None and floor.kind == "noise"


@pytest.mark.parametrize(
    "change", [{"derived": True}, {"lora": "adapter"}, {"layer_bpw": 8.5}, {"against_reference": None}]
)
def test_what_is_no_unquantized_original_makes_no_floor(change: dict[str, Any]) -> None:
    quant = scored("NVFP4", "vllm", 4.5, 0.05)
    changed = IN_VLLM.model_copy(update=change)
    assert floor_of(quant, [REFERENCE, changed, quant]) is None


def test_beside_a_quantized_reference_only_noise_makes_a_floor() -> None:
    whole = scored("F16", "gguf", 16.0, 0.3, quantized=True)
    quant = scored("Q4", "gguf", 4.5, 0.4, quantized=True)
    assert known([REFERENCE, whole, quant]) == [("gguf", None, False)]
    noise = scored("n", "gguf", 4.5, 0.001, {"layer_noise": 2**-9}, quantized=True)
    assert known([REFERENCE, noise, quant]) == [("gguf", "n", False)]


def test_the_control_with_the_models_own_options_goes_before_the_smallest() -> None:
    plain_one = scored("BF16 vLLM", "vllm", 16.0, 0.002)
    coarse = scored("BF16 vLLM KV8", "vllm", 16.0, 0.03, {"kv_cache_dtype": "fp8"})
    quant = scored("A", "vllm", 4.5, 0.02)
    with_cache = scored("B", "vllm", 4.5, 0.02, {"kv_cache_dtype": "fp8"})
    other = scored("C", "vllm", 4.5, 0.02, {"dtype": "float16"})
    records = [REFERENCE, coarse, plain_one, quant, with_cache, other]
    found = {r.label: floor.label for r in records if (floor := floor_of(r, records)) is not None}
    assert found == {"A": "BF16 vLLM", "B": "BF16 vLLM KV8", "C": "BF16 vLLM"}
    assert known(records) == [("vllm", "BF16 vLLM", False), ("vllm", "BF16 vLLM KV8", False)]
    assert [at_floor(r, records) for r in (quant, with_cache, other)] == [False, True, False]


@pytest.mark.parametrize(("kld", "expected"), [(0.0019, True), (0.002, True), (0.0021, False)])
def test_a_value_at_the_floor_is_below_it(kld: float, expected: bool) -> None:
    quant = scored("FP8", "vllm", 8.0, kld)
    assert at_floor(quant, [REFERENCE, IN_VLLM, quant]) is expected
    assert not at_floor(quant, [REFERENCE, quant])


def test_a_lower_bound_is_held_against_no_floor() -> None:
    bound = diverging("BF16", 0.001).metrics["kld"]
    there = scored("Served", "vllm", 4.5, 0.1)
    there = there.model_copy(
        update={"against_reference": diverging("BF16", None, metrics={"kld_bound": bound})}
    )
    records = [REFERENCE, IN_VLLM, there]
    assert floor_of(there, records) is None and not at_floor(there, records) and known(records) == []


def test_an_alias_is_the_same_engine() -> None:
    quant = scored("A", "vllm", 4.5, 0.05).model_copy(update={"engine": "vllm-v1"})
    assert known([REFERENCE, IN_VLLM, quant]) == [("vllm", "BF16 vLLM", False)]


def test_records_keep_their_floor() -> None:
    quant, lost = scored("NVFP4", "vllm", 4.5, 0.05), scored("Q4", "gguf", 4.5, 0.04)
    first, control, second, third = with_floors([REFERENCE, IN_VLLM, quant, lost])
    assert first.against_reference is None
    for one, label in ((control, None), (second, "BF16 vLLM"), (third, None)):
        assert one.against_reference is not None
        kept = ResultRecord.model_validate_json(one.model_dump_json()).against_reference
        assert kept is not None and (None if kept.floor is None else kept.floor.label) == label
