"""What a person asks about a checkpoint first: architecture, size, scheme, context, head, KV cache."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evalq.checkpoint.bits import TensorBits
from evalq.checkpoint.headers import POSITION_KEYS, Checkpoint, config_groups
from evalq.checkpoint.weight_kinds import is_buffer
from evalq.inspect.layers import UNQUANTIZED, part_of

_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "moe_topk")


@dataclass(frozen=True)
class Facts:
    """One checkpoint in a few values; None is what it does not say.

    Args:
        architecture: the class of transformers, or GGUF's name of it.
        parameters: weights, padding included where the file stores padding.
        active_parameters: those that one token passes through, of a mixture of experts.
        scheme: format and scheme in one line.
        activations: what the format does to activations.
        kv_cache: how the checkpoint wants the KV cache stored.
        context_length: longest input in tokens.
        layers: number of blocks.
        hidden: width of the residual stream.
        heads: of the attention.
        kv_heads: heads of keys and values.
        experts: of every layer.
        vocabulary: rows of the embedding by the configuration.
        tied_head: the head is the embedding.
    """

    architecture: str | None
    parameters: int
    active_parameters: int | None
    scheme: str
    activations: str
    kv_cache: str
    context_length: int | None
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    experts: int | None
    vocabulary: int | None
    tied_head: bool


def facts_of(checkpoint: Checkpoint) -> Facts:
    """The facts of a model, from its headers and configuration."""
    if checkpoint.gguf:
        return _gguf_facts(checkpoint)
    experts = checkpoint.integer(*_EXPERTS)
    architectures = checkpoint.config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    name = next(iter(names), checkpoint.config.get("model_type"))
    return Facts(
        architecture=None if name is None else str(name),
        parameters=_parameters(checkpoint.storage.tensors),
        active_parameters=_active(checkpoint, experts, checkpoint.integer(*_ACTIVE)),
        scheme=scheme_line(checkpoint),
        activations=_activations(checkpoint.settings),
        kv_cache=_kv_cache(checkpoint),
        context_length=checkpoint.integer(*POSITION_KEYS),
        layers=checkpoint.integer("num_hidden_layers", "n_layer", "num_layers"),
        hidden=checkpoint.integer("hidden_size", "n_embd", "d_model"),
        heads=checkpoint.integer("num_attention_heads", "n_head"),
        kv_heads=checkpoint.integer("num_key_value_heads"),
        experts=experts,
        vocabulary=checkpoint.integer("vocab_size"),
        tied_head=checkpoint.storage.tied_head,
    )


def _gguf_facts(checkpoint: Checkpoint) -> Facts:
    """The same of a GGUF model, from its settings."""

    def setting(name: str) -> int | None:
        value = checkpoint.gguf_setting(name)
        return value if type(value) is int and value > 0 else None

    architecture = checkpoint.gguf[0].metadata.get("general.architecture")
    experts = setting("expert_count")
    tokens = checkpoint.gguf[0].array_lengths.get("tokenizer.ggml.tokens")
    return Facts(
        architecture=None if architecture is None else str(architecture),
        parameters=_parameters(checkpoint.storage.tensors),
        active_parameters=_active(checkpoint, experts, setting("expert_used_count")),
        scheme=checkpoint.storage.format,
        activations="not quantized by the file",
        kv_cache="chosen when it is run",
        context_length=setting("context_length"),
        layers=setting("block_count"),
        hidden=setting("embedding_length"),
        heads=setting("attention.head_count"),
        kv_heads=setting("attention.head_count_kv"),
        experts=experts,
        vocabulary=tokens or setting("vocab_size"),
        tied_head=checkpoint.storage.tied_head,
    )


def _parameters(tensors: tuple[TensorBits, ...]) -> int:
    """Weights that a training step would change: no masks, tables or left-over scales."""
    return sum(t.numel for t in tensors if _is_parameter(t))


def _is_parameter(tensor: TensorBits) -> bool:
    if tensor.kind != "other":
        return True
    return tensor.format in UNQUANTIZED and not is_buffer(tensor.name) and "scale" not in tensor.name


def _active(checkpoint: Checkpoint, experts: int | None, used: int | None) -> int | None:
    """Parameters that one token passes through; None without experts."""
    if not experts or not used:
        return None
    routed = sum(t.numel for t in checkpoint.storage.tensors if part_of(t) == "experts")
    return _parameters(checkpoint.storage.tensors) - routed + routed * used // experts if routed else None


def scheme_line(checkpoint: Checkpoint) -> str:
    """Format and scheme: "compressed-tensors pack-quantized INT4, group 128, symmetric"."""
    if checkpoint.gguf or checkpoint.storage.format.startswith("EXL3"):
        return checkpoint.storage.format
    first, *others = checkpoint.storage.format.split(", ")
    first = re.sub(r" (group|block|channel|tensor|symmetric|asymmetric)\b", r", \1", first)
    return f"{first}; also {', '.join(others)}" if others else first


def _activations(settings: Mapping[str, Any]) -> str:
    """What the format does to the inputs of quantized layers."""
    schemes = [group.get("input_activations") for group in config_groups(settings)]
    found = sorted({_arguments_line(scheme) for scheme in schemes if isinstance(scheme, dict)})
    if found:
        return "; ".join(found)
    if settings.get("quant_method") == "fp8":
        return f"FP8, {settings.get('activation_scheme', 'dynamic')}"
    algorithm = str(settings.get("quant_algo") or "")
    if algorithm in ("NVFP4", "FP8"):
        return algorithm
    return "not quantized"


def _kv_cache(checkpoint: Checkpoint) -> str:
    """The KV cache that the checkpoint asks for, and whether its scales are in the files."""
    scheme, algorithm = (
        checkpoint.settings.get("kv_cache_scheme"),
        checkpoint.settings.get("kv_cache_quant_algo"),
    )
    scales = sum(t.name.endswith(".k_scale") for t in checkpoint.storage.tensors)
    asked = _arguments_line(scheme) if isinstance(scheme, dict) else str(algorithm or "")
    if not asked:
        return f"scales of {scales} layers in the files, no scheme declared" if scales else "not quantized"
    return f"{asked}, scales of {scales} layers in the files" if scales else asked


def _arguments_line(scheme: Mapping[str, Any]) -> str:
    """Quantization arguments of compressed-tensors, or of ModelOpt's copy of them, in a few words."""
    bits, kind = scheme.get("num_bits"), scheme.get("type")
    name = f"{'FP' if kind == 'float' else 'INT'}{bits}"
    dynamic = scheme.get("dynamic")
    timing = ("dynamic" if dynamic else "static") if isinstance(dynamic, bool) else str(dynamic or "")
    group = scheme.get("group_size")
    grouping = (
        f"group {group}" if group else f"per {scheme.get('strategy')}" if scheme.get("strategy") else ""
    )
    return ", ".join(part for part in (name, timing, grouping) if part)
