"""Shapes against the configuration: sides of the linear layers, vocabulary, layers that are not there.

Sides are compared only for architectures whose layers have exactly the sides that config.json states;
others (latent attention, gates inside a projection, sides that differ by layer) would give false alarms.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from evalq.checkpoint.dimensions import SIDES, side_lengths
from evalq.checkpoint.findings import Finding, Severity
from evalq.checkpoint.headers import Checkpoint
from evalq.checkpoint.safetensors import Logical
from evalq.inspect.layers import is_language_model

# transformers' model types with nn.Linear(hidden_size, num_attention_heads * head_dim) and the like
# (https://github.com/huggingface/transformers/tree/main/src/transformers/models).
PLAIN_TYPES = frozenset(
    "apertus arcee cohere cohere2 ernie4_5 gemma gemma2 gemma3_text glm glm4 gpt_oss granite granitemoe "
    "helium hunyuan_v1_dense llama ministral mistral mixtral nemotron olmo olmo2 olmo3 olmoe qwen2 "
    "qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2".split()
)
_EXL3_PAD = 128
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk)\.(\d+)\.")
_LAYERS_MAX = 10_000  # a config may claim any number
_EXTRA_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def shape_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors whose shape the configuration contradicts, and missing or surplus layers."""
    yield from _layer_findings(checkpoint)
    if checkpoint.gguf:
        yield from _gguf_embedding(checkpoint)
        return
    assert checkpoint.contents is not None
    yield from _head_findings(checkpoint)
    if not _is_plain(checkpoint):
        return
    expected = _expected_sides(checkpoint.text_config)
    for weight in checkpoint.contents.logical:
        if is_language_model(weight.bits.name):
            yield from _wrong_sides(weight, expected)
    if not checkpoint.integer("num_local_experts", "num_experts"):
        yield from _missing_in_layers(checkpoint, expected)


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether the architecture is one whose layers have exactly the modules and sides known here."""
    return str(checkpoint.text_config.get("model_type")) in PLAIN_TYPES


def _expected_sides(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Module name -> possible lengths of every side, [out, in] of a matrix; none where unstated."""
    lengths = {side: tuple(n for n in values if n) for side, values in side_lengths(config).items()}
    vocabulary = config.get("vocab_size")
    lengths["vocabulary"] = (vocabulary,) if type(vocabulary) is int else ()
    sides = {module: (lengths[outputs], lengths[inputs]) for module, (inputs, outputs) in SIDES.items()}
    matrix = (lengths["vocabulary"], lengths["hidden"])
    norm = (lengths["hidden"],)
    return sides | {
        "embed_tokens": matrix, "lm_head": matrix, "input_layernorm": norm, "post_attention_layernorm": norm,
    }  # fmt: skip


def _wrong_sides(weight: Logical, expected: dict[str, tuple[tuple[int, ...], ...]]) -> Iterator[Finding]:
    """A finding if the weight has a side that config.json does not know."""
    module, _, ending = weight.bits.name.rpartition(".")
    allowed = expected.get(module.rpartition(".")[2])
    if allowed is None or ending != "weight" or len(weight.shape) != len(allowed):
        return
    pad = _EXL3_PAD if weight.family is not None and weight.family.maker == "EXL3" else 1
    for length, lengths in zip(weight.shape, allowed, strict=True):
        if lengths and length not in {-(-n // pad) * pad for n in lengths}:
            wanted = " x ".join(" or ".join(map(str, side)) or "any" for side in allowed)
            has = " x ".join(map(str, weight.shape))
            message = f"{weight.bits.name} is {has}; config.json makes it {wanted}"
            yield Finding("shape-mismatch", weight.bits.name, message, "error")
            return


def _layer_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Layers that the configuration counts and the files lack, and the other way round."""
    by_name = {t.name: match for t in checkpoint.storage.tensors if (match := _LAYER.search(t.name))}
    names = [name for name in by_name if is_language_model(name) and "encoder" not in name]
    present = {int(by_name[name][1]) for name in names}
    keys = ("num_hidden_layers", "n_layer", "num_layers")
    count = checkpoint.gguf_setting("block_count") if checkpoint.gguf else checkpoint.integer(*keys)
    if not present or type(count) is not int:
        return
    # Other architectures may share weights between layers.
    severity: Severity = "error" if checkpoint.gguf or _is_plain(checkpoint) else "warning"
    where = "the file's settings count" if checkpoint.gguf else "config.json counts"
    prefix = by_name[names[0]].string[: by_name[names[0]].start(1)]
    for number in sorted(set(range(min(count, _LAYERS_MAX))) - present):
        message = f"{prefix}{number} has no tensors; {where} {count} layers"
        yield Finding("missing-layer", f"{prefix}{number}", message, severity)
    extra = sum(checkpoint.integer(key) or 0 for key in _EXTRA_LAYERS)
    for number in sorted(n for n in present if n >= count + extra):
        message = f"{prefix}{number} is there; {where} {count} layers"
        yield Finding("extra-layer", f"{prefix}{number}", message, "warning")


def _missing_in_layers(checkpoint: Checkpoint, needed: Collection[str]) -> Iterator[Finding]:
    """Weights that some layers of a dense model have and others lack; `needed` are modules of every layer."""
    holders: dict[str, set[int]] = defaultdict(set)
    prefixes: dict[int, str] = {}
    for tensor in checkpoint.storage.tensors:
        match = _LAYER.search(tensor.name)
        if match and tensor.kind in ("layer", "norm") and is_language_model(tensor.name):
            module = tensor.name[match.end() :].rpartition(".")[0]
            holders[module].add(int(match[1]))
            prefixes[int(match[1])] = tensor.name[: match.end()]
    for module, layers in holders.items():
        absent = sorted(prefixes.keys() - layers)
        if module.rpartition(".")[2] not in needed and len(absent) > len(layers):
            for number in sorted(layers):
                name = f"{prefixes[number]}{module}"
                message = f"{name} is there; {len(absent)} other layers have no such module"
                yield Finding("extra-tensor", name, message, "warning")
            continue
        # What is not in the table of sides may belong to some layers alone.
        severity: Severity = "error" if module.rpartition(".")[2] in needed else "warning"
        for number in absent:
            name = f"{prefixes[number]}{module}.weight"
            message = f"{name} is not there; {len(layers)} other layers have it"
            yield Finding("missing-tensor", name, message, severity)


def _head_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A head that config.json ties and the files hold, or the other way round."""
    tied, has_head = checkpoint.text_config.get("tie_word_embeddings"), not checkpoint.storage.tied_head
    if not checkpoint.storage.head_weights:
        return
    if tied is False and not has_head:
        message = "config.json does not tie the head to the embedding, and no head is in the files"
        severity: Severity = "error" if _is_plain(checkpoint) else "warning"
        yield Finding("missing-head", "lm_head.weight", message, severity)
    # exllamav3 writes a quantized copy of a tied head on purpose.
    if tied is True and has_head and not checkpoint.storage.format.startswith("EXL3"):
        name = next(t.name for t in checkpoint.storage.tensors if t.kind == "head")
        message = f"{name} is in the files, and config.json ties the head to the embedding: engines differ"
        yield Finding("tied-head-stored", name, message, "warning")


def _gguf_embedding(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The embedding of a GGUF model against its width and its vocabulary."""
    width = checkpoint.gguf_setting("embedding_length")
    vocabulary = checkpoint.gguf[0].array_lengths.get("tokenizer.ggml.tokens")
    for tensor in (t for header in checkpoint.gguf for t in header.tensors if t.name == "token_embd.weight"):
        wanted = (width or tensor.shape[0], vocabulary or tensor.shape[-1])
        if tensor.shape != wanted:
            message = (
                f"token_embd.weight is {tensor.shape[-1]} x {tensor.shape[0]}; "
                f"the file's settings make it {wanted[1]} x {wanted[0]}"
            )
            yield Finding("shape-mismatch", tensor.name, message, "error")
