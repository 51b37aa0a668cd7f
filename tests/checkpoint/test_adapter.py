"""LoRA adapters: reading them, refusing what an engine would get wrong, and their way into a result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runs
from lora_adapters import write_gguf, write_peft, write_peft_tensors

from evalq.checkpoint.adapter import FEATURES, read_adapter, require_features, require_fits
from evalq.errors import ModelError

UP = "model.layers.0.mlp.up_proj"


def pair(module: str, rank: int = 4, out: int = 16, inside: int = 8) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": torch.ones(rank, inside),
        f"{prefix}.lora_B.weight": torch.ones(out, rank),
    }


def peft(folder: Path, tensors: dict[str, torch.Tensor] | None = None, rank: int = 4, **config: Any) -> Path:
    return write_peft_tensors(folder / "adapter", tensors or pair(UP), rank, **config)


def test_a_peft_adapter_is_read_from_its_headers(tmp_path: Path) -> None:
    adapter = read_adapter(peft(tmp_path, pair(UP) | pair("model.layers.1.mlp.up_proj", rank=8)), "mine")
    assert (adapter.name, adapter.kind, adapter.rank, adapter.alpha) == ("mine", "peft", 8, 32.0)
    assert adapter.shapes == {UP: (16, 8), "model.layers.1.mlp.up_proj": (16, 8)}
    assert adapter.features == ()
    assert [file.name for file in adapter.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter.bytes == 4 * (4 * (16 + 8) + 8 * (16 + 8))


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"use_rslora": True}, "rslora"),
        ({"use_dora": True}, "dora"),
        ({"rank_pattern": {"up_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"up_proj": 8}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 4], [2, 6]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_tokens"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"init_lora_weights": "pissa"}, "base_changed"),
        ({"use_qalora": True}, "variant"),
    ],
)
def test_what_goes_beyond_plain_lora_is_named_and_refused(
    tmp_path: Path, config: dict[str, Any], feature: str
) -> None:
    adapter = read_adapter(peft(tmp_path, **config))
    assert adapter.features == (feature,)
    require_features(adapter, FEATURES, "an engine that knows all")
    with pytest.raises(ModelError, match=rf"uses {feature} \(.+\), which exl9 would not apply") as caught:
        require_features(adapter, {"nothing"}, "exl9")
    assert caught.value.category == "bad_adapter" and "merge-lora" in str(caught.value)


def test_plain_initializations_are_no_feature(tmp_path: Path) -> None:
    assert read_adapter(peft(tmp_path, init_lora_weights="gaussian")).features == ()


@pytest.mark.parametrize(
    ("tensor", "feature"),
    [
        (f"base_model.model.{UP}.lora_magnitude_vector.weight", "dora"),
        (f"base_model.model.{UP}.bias", "bias"),
        ("base_model.model.lm_head.weight", "modules_to_save"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
    ],
)
def test_tensors_tell_what_the_config_does_not(tmp_path: Path, tensor: str, feature: str) -> None:
    assert read_adapter(peft(tmp_path, pair(UP) | {tensor: torch.ones(2)})).features == (feature,)


def test_an_adapter_of_the_head_is_named(tmp_path: Path) -> None:
    assert read_adapter(peft(tmp_path, pair(UP) | pair("lm_head"))).features == ("lm_head",)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, True, "8", None, 10**400, 2**63, [8]])
@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_numbers_that_no_adapter_has(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"{key} should be a positive") as caught:
        read_adapter(peft(tmp_path, **{key: value}))
    assert caught.value.category == "bad_adapter"
    assert len(str(caught.value)) < 400


def test_broken_adapters_say_what_is_wrong(tmp_path: Path) -> None:
    def error(path: Path) -> ModelError:
        with pytest.raises(ModelError) as caught:
            read_adapter(path)
        return caught.value

    missing = error(tmp_path / "nowhere")
    assert missing.category == "model_missing" and "no such file or directory" in missing.message
    (tmp_path / "empty").mkdir()
    assert "no PEFT adapter" in error(tmp_path / "empty").message
    half = pair(UP)
    half.pop(f"base_model.model.{UP}.lora_B.weight")
    assert f"{UP} has A [4, 8] and B []" in error(peft(tmp_path / "half", half)).message
    prefix = error(peft(tmp_path / "prefix", peft_type="PREFIX_TUNING"))
    assert prefix.category == "bad_adapter" and "PREFIX_TUNING" in prefix.message
    assert "r should be a positive integer, not 0" in error(peft(tmp_path / "rank", r=0)).message
    pickled = peft(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert error(pickled).category == "unsafe_checkpoint"
    assert '"adapter_model.safetensors"' in str(error(pickled))
    truncated = peft(tmp_path / "truncated") / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-4])
    assert error(truncated.parent).category == "model_corrupt"


def test_an_adapter_for_another_model_names_the_module_and_both_shapes(tmp_path: Path) -> None:
    adapter = read_adapter(peft(tmp_path), "mine")
    require_fits(adapter, {UP: (16, 8), "lm_head": (10, 8)})
    require_fits(adapter, {f"language_model.{UP}": (16, 8)})  # wrappers put a prefix before it
    with pytest.raises(ModelError, match=r"up_proj is \[32, 8\] in the base, \[16, 8\] in the adapter"):
        require_fits(adapter, {UP: (32, 8)})
    with pytest.raises(ModelError, match=rf"the base has no {UP}"):
        require_fits(adapter, {"model.layers.1.mlp.up_proj": (16, 8)})


def test_a_backend_without_adapters_refuses_and_nothing_is_lost(runs: Runs) -> None:
    adapter = peft(runs.folder)
    models = runs.models({}, {"lora": {"path": str(adapter), "name": "tuned"}})
    code, (plain, refused) = runs.compare(runs.data(), models)
    assert code == 1 and plain["status"] == "ok" and plain["lora"] is None
    assert refused["label"] == "Fake 1 + tuned" and refused["lora"] == "tuned"
    assert (
        refused["error"]["category"] == "bad_adapter"
        and "fake applies no adapters" in refused["error"]["message"]
    )


def test_an_adapter_that_is_nowhere_is_a_result_of_its_model(runs: Runs) -> None:
    model = {"load_fn": "hf", "fwd_fn": "hf", "lora": {"path": "nowhere"}}
    code, (record, *_) = runs.compare(runs.data(), runs.models(model, {}))
    assert code == 1 and record["error"]["category"] == "model_missing"
    assert "models[0].lora.path" in record["error"]["message"]


@pytest.mark.engine
def test_base_with_adapter_equals_merged_on_transformers_and_llama_cpp(runs: Runs, smollm2: Any) -> None:
    """The same down-projection adapter on both engines, and merged into the weights."""
    from lora_adapters import merged

    base = smollm2("bf16")
    whole = write_peft(runs.folder / "whole", base)
    down = {k: v for k, v in _load(whole).items() if ".down_proj." in k}
    adapter = write_peft_tensors(runs.folder / "down", down, 8)
    fp32 = {"load_fn": "hf", "fwd_fn": "hf", "options": {"dtype": "float32"}}
    gguf = {"load_fn": "gguf", "fwd_fn": "gguf", "model_dir": str(smollm2("F16.gguf"))}
    models = runs.models(
        fp32 | {"model_dir": str(base), "label": "base"},
        fp32 | {"model_dir": str(base), "label": "base", "lora": {"path": "down"}},
        fp32 | {"model_dir": str(merged(base, adapter, runs.folder / "merged")), "label": "merged"},
        gguf | {"label": "gguf", "lora": {"path": str(write_gguf(runs.folder / "down.gguf", whole))}},
    )
    code, (plain, added, whole_record, llama) = runs.compare(runs.data(tokenize_fn=None, max_rows=3), models)
    assert code == 0
    assert added["ppl"] == pytest.approx(whole_record["ppl"], rel=1e-5)
    assert llama["ppl"] == pytest.approx(whole_record["ppl"], rel=2e-3)
    assert added["ppl"] > 1.01 * plain["ppl"]
    assert added["label"] == "base + down" and added["format"] == "BF16 + LoRA r8"
    assert added["layer_bpw"] > plain["layer_bpw"] and added["identity"]["lora_digest"]


@pytest.mark.engine
def test_llama_cpp_wants_its_own_adapters(runs: Runs, smollm2: Any) -> None:
    adapter = write_peft(runs.folder / "adapter", smollm2("bf16"))
    model = {
        "load_fn": "gguf",
        "fwd_fn": "gguf",
        "model_dir": str(smollm2("SmolLM2-135M-Instruct.Q4_1.gguf")),
    }
    models = runs.models(model | {"lora": {"path": str(adapter)}})
    code, (record,) = runs.compare(runs.data(tokenize_fn=None), models)
    assert code == 1 and record["error"]["category"] == "bad_adapter"
    assert "convert_lora_to_gguf" in record["error"]["remedy"]


def _load(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")
