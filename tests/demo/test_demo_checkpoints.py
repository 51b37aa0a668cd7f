"""What demo/build.py makes, on a model small enough to quantize in a blink."""

import json

import gguf
import numpy as np
import pytest
import torch
from demo_scripts import build as demo_build
from demo_scripts import from_gguf, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from evalq.errors import EvalqError

BYTE_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "t"), ("Ċ", "Ċ"), ("Ġ", "Ċ"), ("ĠĊ", "Ċ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"), ("Â", "½"), ("Ġ", "Â½")]
TOKENS = ["<|end|>", *BYTE_LETTERS, *("".join(pair) for pair in MERGES)]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


# --- quantization ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_model().save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    for name, recipe in quantize.RECIPES.items():
        quantize.quantize_checkpoint(checkpoint, folder / name, recipe)
    return folder


def load_dense(path):
    config = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers', whenever one is passed
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


def linear_weights(model):
    return {
        name: module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def largest_error(name, weight, tensors, layer):
    """What rounding to nearest may cost each weight of a layer, [O, I]."""
    scale = tensors[f"{layer}.weight_scale"].float()
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    if name == "fp8":  # E4M3: 3 bits of mantissa, subnormals of 2**-9
        return (weight.abs() * 2.0**-4).clamp(min=scale * 2.0**-10)
    if name == "nvfp4":  # E2M1: 0 .5 1 1.5 2 3 4 6, the widest step is 2
        return scale / tensors[f"{layer}.weight_global_scale"]
    return scale / 2


@pytest.mark.parametrize("name", quantize.RECIPES)
def test_dequantized_weights_are_within_half_a_step(checkpoint, quantized, name):
    before = linear_weights(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16))
    after = linear_weights(load_dense(quantized / name))
    tensors = load_file(quantized / name / "model.safetensors")
    assert len(before) == 14
    for layer, weight in before.items():
        error = (after[layer] - weight).abs()
        # The dequantized weight is rounded to BF16, 8 bits of mantissa; so was the scale before.
        allowed = largest_error(name, weight, tensors, layer) + weight.abs() * 2.0**-7
        assert (error <= allowed).all(), layer
        assert error.max() > 0


def test_nvfp4_global_scale_is_shared_by_layers_that_engines_fuse(quantized):
    tensors = load_file(quantized / "nvfp4" / "model.safetensors")
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        q, k, v, o = (tensors[f"{attention}.{x}_proj.weight_global_scale"] for x in "qkvo")
        gate, up = (tensors[f"{mlp}.{x}_proj.weight_global_scale"] for x in ("gate", "up"))
        assert q == k == v
        assert gate == up
        assert len({q.item(), o.item(), gate.item()}) == 3


@pytest.mark.parametrize("name", quantize.RECIPES)
def test_checkpoint_is_complete(checkpoint, quantized, name):
    folder = quantized / name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    expected = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}.get(name, "pack-quantized")
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", expected)
    assert config["ignore"] == ["lm_head"]
    assert config["quantization_status"] == "compressed"
    tensors = load_file(folder / "model.safetensors")
    dense = load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied
    assert torch.equal(tensors["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    text = "the 4 ½\n\n\n 1"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(checkpoint)(text)


@pytest.mark.parametrize("name", quantize.RECIPES)
def test_transformers_scores_the_checkpoint(checkpoint, quantized, name):
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)(ids, labels=ids).loss
        unpacked = load_dense(quantized / name)(ids, labels=ids).loss
        packed = AutoModelForCausalLM.from_pretrained(quantized / name, dtype=torch.bfloat16)(
            ids, labels=ids
        ).loss
    assert unpacked.item() == pytest.approx(dense.item(), rel=0.02)
    assert packed.item() == pytest.approx(dense.item(), rel=0.02)


def test_a_group_that_does_not_divide_the_rows_is_refused():
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: 128 input features .* multiple of 96"
    ):
        quantize.quantize_model(tiny_model(), quantize.Recipe("W4A16", {"group_size": 96}))


# --- from a GGUF file ---


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """The tiny model as a GGUF with Q4_1 weights, and the weights that it holds."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in tiny_model().float().state_dict().items():
        if name == "lm_head.weight":
            continue
        packed = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the halves of a head
            heads = 4 if "q_proj" in name else 2
            packed = packed.reshape(heads, 2, 16, 128).swapaxes(1, 2).reshape(packed.shape)
        kind = gguf.GGMLQuantizationType.F32 if packed.ndim == 1 else gguf.GGMLQuantizationType.Q4_1
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, gguf.quants.quantize(packed, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bf16_checkpoint_holds_the_weights_and_tokens_of_the_gguf(tiny_gguf, tmp_path):
    from_gguf.write_bf16_checkpoint(tiny_gguf, tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    written = load_file(tmp_path / "bf16" / "model.safetensors")
    exact = tiny_model().state_dict()
    assert set(written) == set(exact) - {"lm_head.weight"}
    for name, weight in written.items():
        assert weight.dtype == torch.bfloat16
        if weight.ndim == 2:  # Q4_1: 15 steps over the range of 32 weights
            groups = exact[name].float().unflatten(-1, (-1, 32))
            step = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(32, dim=-1)
            assert ((weight.float() - exact[name].float()).abs() <= step * 0.55).all(), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bf16")
    text = "the 12 ½ of it : \n\n\n 1 ² \n\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == from_gguf.gguf_token_ids(tiny_gguf, text)
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_unlike_that_of_llama_cpp_is_refused(tiny_gguf, tmp_path):
    other = tmp_path / "gpt2.gguf"
    content = tiny_gguf.read_bytes()
    assert content.count(b"smollm") == 1
    other.write_bytes(content.replace(b"smollm", b"gpt-2\0").replace(b"gpt-2\0", b"olmo\0\0"))
    with pytest.raises(EvalqError, match="different tokens"):
        from_gguf.write_bf16_checkpoint(other, tmp_path / "bf16")


@pytest.mark.parametrize("type_name", demo_build.GGUF_TYPES)
def test_requantized_gguf_has_the_type_of_its_name(tiny_gguf, tmp_path, capfd, type_name):
    from_gguf.requantize_gguf(tiny_gguf, tmp_path / "out.gguf", type_name)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert tensors["blk.1.attn_q.weight"].tensor_type.name == {"Q3_K_S": "Q4_0"}.get(type_name, type_name)
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == {"Q3_K_S": "Q3_K"}.get(type_name, type_name)
    exact = tiny_model().state_dict()["model.layers.1.mlp.down_proj.weight"].float().numpy()
    error = gguf.quants.dequantize(down.data, down.tensor_type) - exact
    assert np.square(error).mean() < 0.06 * np.square(exact).mean()
    assert capfd.readouterr() == ("", "")


def test_a_gguf_that_llama_cpp_cannot_read_is_an_error(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(EvalqError, match="could not write Q8_0"):
        from_gguf.requantize_gguf(tmp_path / "broken.gguf", tmp_path / "out.gguf", "Q8_0")
