"""Writers of small checkpoints: the one place where tests make models.

    write_model, write_shards    tensors by name, dtype and shape; weights are holes, of any size
    make_tiny                    a model that the fake backend can score
    write_gguf                   GGUF
    llama, deepseek, gpt_oss     whole models in the layouts of all formats

No torch. Real quantized models come from compress_llama.py, adapters from lora_adapters.py.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from evalq.checkpoint.shards import DTYPE_BITS

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write_file(path: Path, shapes: Shapes, values: dict[str, bytes] | None = None) -> None:
    """A safetensors file with zeros for data, but for `values`; takes no room on the disk."""
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
        for name, value in (values or {}).items():
            begin, end = header[name]["data_offsets"]
            assert len(value) == end - begin
            file.seek(8 + len(text) + begin)
            file.write(value)


def write_model(
    directory: Path, shapes: Shapes, config: dict | None = None, values: dict[str, bytes] | None = None
) -> Path:
    """A checkpoint of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "model.safetensors", shapes, values)
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


def write_shards(directory: Path, shards: Iterable[Shapes], config: dict | None = None) -> Path:
    """A checkpoint of several files with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    shards, weight_map = list(shards), {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shapes)
        weight_map.update(dict.fromkeys(shapes, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


def make_tiny(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A model of one layer with random weights; only the fake backend can score it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(258, 8)).astype(np.float16),
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(16, 8)).astype(np.float16),
        "model.layers.0.input_layernorm.weight": np.ones(8, np.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    facts = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 258, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(facts | config))
    return folder


def headers_only(folder: Path, gib: int) -> Path:
    """A Llama of that many GiB that takes no room on the disk."""
    config = llama_config(vocab=65536, max_position_embeddings=8192, tie_word_embeddings=True)
    sides = (config["intermediate_size"], config["hidden_size"])
    layers = gib * 2**30 // (2 * math.prod(sides))
    shapes = plain("model.embed_tokens", 65536, 4096)
    for number in range(layers):
        shapes |= plain(f"model.layers.{number}.mlp.up_proj", *sides)
    more = {"num_hidden_layers": layers, "head_dim": 128, "torch_dtype": "bfloat16"}
    return write_model(folder, shapes, config | more)


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], vocab: int = 8, **options: Any) -> Path:
    """A GGUF model.

    Args:
        path: of the file; with split_max_tensors among the options its parts are named after it.
        tensors: by name; bytes of a quantized type come as (array, type).
        vocab: tokens.
        options: of the writer.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_context_length(4096)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_token_list([f"token {i} \u00e9" for i in range(vocab)])
    writer.add_token_scores([0.5] * vocab)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_config(
    hidden: int = 4096, inner: int = 14336, heads: int = 32, kv_heads: int = 8, vocab: int = 128256,
    layers: int = 32, **more: object,
) -> dict:  # fmt: skip
    """config.json of Llama-3.1-8B, or of a smaller model of its kind."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    } | more


def around(layers: Shapes, vocab: int = 10, hidden: int = 64) -> Shapes:
    """The layers with an embedding, a head, a norm and a bias, none of which may count as a layer."""
    return {
        "model.embed_tokens.weight": ("BF16", (vocab, hidden)),
        "lm_head.weight": ("F16", (vocab, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        "model.layers.0.self_attn.q_proj.bias": ("BF16", (hidden,)),
        **layers,
    }


def small_config(**more: object) -> dict:
    return llama_config(hidden=256, inner=512, heads=4, kv_heads=2, vocab=96, layers=2, **more)


def linear_sides(config: dict) -> dict[str, tuple[int, int]]:
    """Module of a layer -> (out, in)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def plain(stem: str, out: int, inputs: int) -> Shapes:
    return {f"{stem}.weight": ("BF16", (out, inputs))}


def packed_int4(stem: str, out: int, inputs: int) -> Shapes:
    """compressed-tensors pack-quantized, group 128."""
    return {
        f"{stem}.weight_packed": ("I32", (out, -(-inputs // 8))),
        f"{stem}.weight_scale": ("BF16", (out, -(-inputs // 128))),
    }


def nvfp4(stem: str, out: int, inputs: int) -> Shapes:
    return {
        f"{stem}.weight_packed": ("U8", (out, inputs // 2)),
        f"{stem}.weight_scale": ("F8_E4M3", (out, inputs // 16)),
        f"{stem}.weight_global_scale": ("F32", (1,)),
        f"{stem}.input_global_scale": ("F32", (1,)),
    }


def mxfp4(stem: str, out: int, inputs: int) -> Shapes:
    return {
        f"{stem}.weight_packed": ("U8", (out, inputs // 2)),
        f"{stem}.weight_scale": ("U8", (out, inputs // 32)),
    }


def int8(stem: str, out: int, inputs: int) -> Shapes:
    """compressed-tensors int-quantized, one scale a row."""
    return {f"{stem}.weight": ("I8", (out, inputs)), f"{stem}.weight_scale": ("BF16", (out, 1))}


def fp8_block(stem: str, out: int, inputs: int) -> Shapes:
    return {
        f"{stem}.weight": ("F8_E4M3", (out, inputs)),
        f"{stem}.weight_scale_inv": ("F32", (-(-out // 128), -(-inputs // 128))),
    }


def gptq(stem: str, out: int, inputs: int) -> Shapes:
    groups = -(-inputs // 128)
    return {
        f"{stem}.qweight": ("I32", (inputs // 8, out)),
        f"{stem}.qzeros": ("I32", (groups, out // 8)),
        f"{stem}.scales": ("F16", (groups, out)),
        f"{stem}.g_idx": ("I32", (inputs,)),
    }


def awq(stem: str, out: int, inputs: int) -> Shapes:
    groups = -(-inputs // 128)
    return {
        f"{stem}.qweight": ("I32", (inputs, out // 8)),
        f"{stem}.qzeros": ("I32", (groups, out // 8)),
        f"{stem}.scales": ("F16", (groups, out)),
    }


def bnb(stem: str, out: int, inputs: int) -> Shapes:
    return {
        f"{stem}.weight": ("U8", (out * inputs // 2, 1)),
        f"{stem}.weight.absmax": ("F32", (out * inputs // 64,)),
        f"{stem}.weight.quant_map": ("F32", (16,)),
        f"{stem}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }


def exl3(stem: str, out: int, inputs: int, bits: int = 4) -> Shapes:
    return {
        f"{stem}.trellis": ("I16", (inputs // 16, out // 16, 16 * bits)),
        f"{stem}.suh": ("F16", (inputs,)),
        f"{stem}.svh": ("F16", (out,)),
        f"{stem}.mcg": ("I32", ()),
    }


def llama(config: dict, linear=plain, head=plain) -> Shapes:
    """All tensors of a Llama whose linear layers are made by `linear`, its head by `head` (None: tied)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = plain("model.embed_tokens", vocab, hidden)
    for number in range(config["num_hidden_layers"]):
        for module, sides in linear_sides(config).items():
            shapes |= linear(f"model.layers.{number}.{module}", *sides)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{norm}.weight"] = ("BF16", (hidden,))
    shapes["model.norm.weight"] = ("BF16", (hidden,))
    return shapes | ({} if head is None else head("lm_head", vocab, hidden))


def compressed(bits: int, form: str, kind: str = "int", **more: object) -> dict:
    """quantization_config of compressed-tensors."""
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
    } | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def deepseek(directory: Path, layers: int = 61, experts: int = 256) -> Path:
    """DeepSeek-V3 in FP8, one shard per layer: three dense layers, experts, the prediction layer."""
    hidden = 7168
    sides = {
        "self_attn.q_a_proj": (1536, hidden),
        "self_attn.q_b_proj": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, hidden),
        "self_attn.kv_b_proj": (32768, 512),
        "self_attn.o_proj": (hidden, 16384),
    }
    shards = [plain("model.embed_tokens", 129280, hidden) | plain("lm_head", 129280, hidden)]
    for number in range(layers + 1):
        stem, shapes = f"model.layers.{number}", {}
        for module, (out, inputs) in sides.items():
            shapes |= fp8_block(f"{stem}.{module}", out, inputs)
        blocks = {"mlp": 18432}
        if number >= 3:
            blocks = {f"mlp.experts.{n}": 2048 for n in range(experts)} | {"mlp.shared_experts": 2048}
            shapes[f"{stem}.mlp.gate.weight"] = ("BF16", (experts, hidden))
            shapes[f"{stem}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for block, inner in blocks.items():
            shapes |= fp8_block(f"{stem}.{block}.gate_proj", inner, hidden)
            shapes |= fp8_block(f"{stem}.{block}.up_proj", inner, hidden)
            shapes |= fp8_block(f"{stem}.{block}.down_proj", hidden, inner)
        shapes[f"{stem}.input_layernorm.weight"] = ("BF16", (hidden,))
        shards.append(shapes)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_nextn_predict_layers": 1, "n_routed_experts": experts,
        "num_experts_per_tok": 8, "num_attention_heads": 128, "num_key_value_heads": 128,
        "vocab_size": 129280, "max_position_embeddings": 163840, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    }  # fmt: skip
    return write_shards(directory, shards, config)


def gpt_oss(directory: Path, layers: int = 24, experts: int = 32) -> Path:
    """gpt-oss-20b: experts in MXFP4, the rest in BF16."""
    hidden = 2880
    shapes = plain("model.embed_tokens", 201088, hidden) | plain("lm_head", 201088, hidden)
    for number in range(layers):
        stem = f"model.layers.{number}"
        sides = {"q_proj": (4096, hidden), "k_proj": (512, hidden), "v_proj": (512, hidden)}
        for module, (out, inputs) in (sides | {"o_proj": (hidden, 4096)}).items():
            shapes |= plain(f"{stem}.self_attn.{module}", out, inputs)
            shapes[f"{stem}.self_attn.{module}.bias"] = ("BF16", (out,))
        shapes[f"{stem}.self_attn.sinks"] = ("BF16", (64,))
        shapes |= plain(f"{stem}.mlp.router", experts, hidden)
        for part, out in (("gate_up_proj", 5760), ("down_proj", 2880)):
            shapes[f"{stem}.mlp.experts.{part}_blocks"] = ("U8", (experts, out, 90, 16))
            shapes[f"{stem}.mlp.experts.{part}_scales"] = ("U8", (experts, out, 90))
            shapes[f"{stem}.mlp.experts.{part}_bias"] = ("BF16", (experts, out))
        shapes[f"{stem}.input_layernorm.weight"] = ("BF16", (hidden,))
    config = llama_config(
        hidden, 2880, 64, 8, 201088, layers, architectures=["GptOssForCausalLM"], model_type="gpt_oss",
        head_dim=64, num_local_experts=experts, num_experts_per_tok=4,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    )  # fmt: skip
    return write_model(directory, shapes, config)
