"""`evalq merge-lora`: the weights PEFT's merge_and_unload makes, and refusals that name what does not fit."""

import argparse
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from convert_cases import compress, config, loaded, tensors
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from evalq.cli import merge_lora as merge_command
from evalq.convert.dequantize import dequantize
from evalq.convert.merge import merge_lora
from evalq.errors import ModelError, SpecError

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
QUANTIZED = ("W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "NVFP4A16")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    compress(folder, *QUANTIZED)
    return folder


def llama(tied: bool = False, hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "llama"
    llama().to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapter_for(model: Any, out: Path, **changes: Any) -> Path:
    """An adapter with random A and B, as PEFT saves it."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "init_lora_weights": False,
    }
    # False: PEFT would copy embedding and head beside an adapter that has a part for the head.
    get_peft_model(model, LoraConfig(**settings | changes)).save_pretrained(out, save_embedding_layers=False)
    return out


def by_peft(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    merge_command.add_arguments(parser)
    return merge_command.run(parser.parse_args([str(word) for word in words]))


def require_merged(base: Path, adapter: Path, target: Path, dense_base: Path) -> None:
    """Merge in float32, where the order of rounding does not matter, and compare with PEFT."""
    assert run(base, adapter, target, "--dtype", "float32") == 0
    before = loaded(dense_base, torch.float32).state_dict()
    found, expected = tensors(target), by_peft(loaded(dense_base, torch.float32), adapter)
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name].float())]
    assert len(changed) >= 4
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-6)
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        merged = loaded(target, torch.float32)(ids).logits
        on_top = PeftModel.from_pretrained(loaded(dense_base, torch.float32), adapter)(ids).logits
    torch.testing.assert_close(merged, on_top, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"target_modules": [*TARGETS, "lm_head"], "use_rslora": True, "rank_pattern": {"down_proj": 7}},
    ],
)
def test_merged_is_what_peft_merges(dense: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = adapter_for(llama(), tmp_path / "adapter", **changes)
    require_merged(dense, adapter, tmp_path / "merged", dense)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_merged_into_a_quantized_base(quantized: Path, tmp_path: Path, scheme: str) -> None:
    base = quantized / scheme
    dequantize(base, tmp_path / "base", "float32")
    adapter = adapter_for(loaded(tmp_path / "base", torch.float32), tmp_path / "adapter")
    require_merged(base, adapter, tmp_path / "merged", tmp_path / "base")
    assert "quantization_config" not in config(tmp_path / "merged")


def test_layers_that_keep_their_weight_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64))
    model.save_pretrained(tmp_path / "gpt2")
    changes = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    adapter = adapter_for(model, tmp_path / "adapter", **changes)
    require_merged(tmp_path / "gpt2", adapter, tmp_path / "merged", tmp_path / "gpt2")


def test_a_dense_base_keeps_its_dtype(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_for(llama(), tmp_path / "adapter")
    assert run(dense, adapter, tmp_path / "merged") == 0
    assert "21 weights, none was quantized" in capsys.readouterr().err
    found, expected = tensors(tmp_path / "merged"), by_peft(loaded(dense, torch.float32), adapter)
    assert config(tmp_path / "merged") == config(dense)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


# --- bad input ---


def refusal(base: Path, adapter: Path, target: Path) -> str:
    with pytest.raises(ModelError) as caught:
        merge_lora(base, adapter, target)
    message = str(caught.value)
    assert "\n" not in message
    assert [path.name for path in target.parent.glob("merged*")] == []
    return message


def test_an_adapter_for_another_model(dense: Path, tmp_path: Path) -> None:
    wider = adapter_for(llama(hidden=32), tmp_path / "wider")
    assert (
        "adapter wider is for another model: model.layers.0.mlp.down_proj is [64, 96] in the base, "
        "[32, 96] in the adapter (out, in)"
    ) in refusal(dense, wider, tmp_path / "merged")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64))
    other = adapter_for(gpt2, tmp_path / "other", target_modules=["c_attn"], fan_in_fan_out=True)
    assert "the base has no transformer.h.0.attn.c_attn" in refusal(dense, other, tmp_path / "merged")


@pytest.mark.parametrize(
    ("feature", "changes"),
    [
        ("dora", {"use_dora": True}),
        ("bias", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("base_changed", {"init_lora_weights": "olora"}),
    ],
)
def test_a_feature_that_cannot_be_merged_is_named(
    dense: Path, tmp_path: Path, feature: str, changes: dict[str, Any]
) -> None:
    adapter = adapter_for(llama(), tmp_path / "adapter", **changes)
    message = refusal(dense, adapter, tmp_path / "merged")
    assert f"adapter adapter uses {feature} (" in message
    assert "which cannot be merged here (write a dense base" in message


def test_an_adapter_of_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "tied")
    adapter = adapter_for(llama(), tmp_path / "adapter", target_modules=["lm_head"])
    message = refusal(tmp_path / "tied", adapter, tmp_path / "merged")
    assert "changes lm_head, which is the embedding of" in message


def test_what_is_no_peft_adapter(dense: Path, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refusal(dense, dense, tmp_path / "merged")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for part, shape in (("a", (2, 64)), ("b", (64, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(dense, tmp_path / "a.gguf", tmp_path / "merged")
    assert "a.gguf is a GGUF adapter (name the PEFT directory" in message


def test_a_target_that_exists(dense: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama(), tmp_path / "adapter")
    with pytest.raises(SpecError, match="llama exists already"):
        merge_lora(dense, adapter, dense)
