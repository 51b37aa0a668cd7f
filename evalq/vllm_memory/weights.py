"""Bytes of weights on one GPU, from headers.

vLLM's "Model loading took" is what the headers say, with these differences (each measured or read in vLLM):

- tensor parallelism divides every matrix, and replicates norms, routers, latent down-projections (MLA),
  positions, and what a row-parallel layer adds or scales after its sum: biases and per-channel scales;
- key and value projections with fewer heads than GPUs are replicated to one head each;
- vocabulary matrices are padded to a multiple of 64 rows (`VocabParallelEmbedding`);
- layers beyond num_hidden_layers (multi-token prediction), a stored copy of a tied head, and FP32 copies of
  weights are not kept as such: the first two are skipped, the last are cast to the 16-bit run dtype;
  per-channel scales are kept in FP32;
- a RoPE cache of max_position_embeddings x rotary dims x 2 bytes is added (`RotaryEmbedding`): the whole
  difference between Llama-3.1-8B's headers (14.958 GiB) and vLLM's figure (14.99);
- MXFP4 experts store a hidden size rounded up to 256 (gpt-oss: 2880 as 3072; 12.82 GiB of headers become
  13.47; vLLM `mxfp4_round_up_hidden_size_and_intermediate_size`);
- MLA keeps two 16-bit matrices made from kv_b_proj beside it (`MLAAttention.process_weights_after_loading`).
"""

import math
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from evalq.checkpoint.families import STRAY_ENDINGS
from evalq.checkpoint.headers import config_groups
from evalq.checkpoint.shape import OTHER_TOWERS, Header, ModelShape, integer, layer_number
from evalq.checkpoint.weight_kinds import kind_of

_NEVER_LOADED = ("rotary_emb.inv_freq", ".weight_shape", ".masked_bias", ".position_ids")
_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa", "shared_expert_gate", "embed_positions", "wpe")
_ROW_PARALLEL = re.compile(r"(?:^|\.)(o_proj|down_proj|w2|out_proj|dense|dense_4h_to_h|fc2|c_proj|wo)[._]")
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
_KEY_VALUE = re.compile(r"\.(k_proj|v_proj)\.")
_SIDECARS = (".scales", "_scales", ".qzeros", ".g_idx", "_scale", "_scale_inv", *STRAY_ENDINGS)


@dataclass(frozen=True)
class RankWeights:
    """Bytes of weights on the fullest GPU.

    Args:
        files: shares of the tensors of the files.
        padding: rows and columns the engine adds.
        rope: tables of rotations.
        derived: matrices the engine makes from others and keeps.
        lora: slots for adapters.
        layers: of `files` and `padding`, what belongs to hidden layers and can be offloaded.
        linear: of `layers`, what a quantizer would store otherwise.
        linear_weights: how many weights `linear` stands for.
    """

    files: int
    padding: int
    rope: int
    derived: int
    lora: int
    layers: int
    linear: int
    linear_weights: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.padding + self.rope + self.derived + self.lora


def stages(n_layers: int, pp: int) -> list[range]:
    """Layers of each pipeline stage, as vLLM's `get_pp_indices` cuts them."""
    sizes = [n_layers // pp] * pp
    for i in range(2, n_layers % pp + 2):
        sizes[-i] += 1
    return [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def rank_weights(
    shape: ModelShape, tp: int = 1, pp: int = 1, stage: int = 0, lora_rank: int = 0, max_loras: int = 1
) -> RankWeights:
    """Weights on one GPU of a pipeline stage.

    Args:
        shape: of the model.
        tp: GPUs that share each layer.
        pp: pipeline stages.
        stage: which of them.
        lora_rank: of the adapters' slots, 0 without adapters.
        max_loras: adapters at once.
    """
    layers = stages(shape.layers, pp)[stage]
    is_first, is_last = stage == 0, stage == pp - 1
    tied = shape.config.get("tie_word_embeddings") is True
    files = padding = in_layers = linear = linear_weights = 0.0
    for tensor in shape.headers:
        place = _place(tensor.name, shape.layers)
        if place is None or (isinstance(place, int) and place not in layers):
            continue
        if place == "head" and (tied or not is_last):
            continue
        if place == "start" and not is_first and not (tied and is_last and "embed_tokens" in tensor.name):
            continue
        if place == "end" and not is_last:
            continue
        kept = tensor.count * _kept_bytes(tensor) * _share(tensor, shape, tp)
        more = kept * (_padding(tensor, shape) - 1)
        files, padding = files + kept, padding + more
        if isinstance(place, int):
            in_layers += kept + more
            weights = _linear_weights(tensor, shape)
            if weights is not None:
                linear += kept + more
                linear_weights += tensor.count * weights * _share(tensor, shape, tp)
    return RankWeights(
        files=round(files),
        padding=round(padding),
        rope=_rope_bytes(shape),
        derived=_mla_bytes(shape, len(layers)) // tp,
        lora=_lora_bytes(shape, len(layers), tp, lora_rank) * max_loras if lora_rank else 0,
        layers=round(in_layers),
        linear=round(linear),
        linear_weights=round(linear_weights),
    )


def _place(name: str, n_layers: int) -> int | str | None:
    """Layer number, "start", "head", "end" (final norm), or None for what is never loaded."""
    if name.endswith(_NEVER_LOADED) or name.startswith("mtp."):
        return None
    number = layer_number(name)
    if number is not None:
        return number if number < n_layers else None
    kind = kind_of(name, 2)
    if kind == "head":
        return "head"
    return "end" if "norm" in name and not any(tower in name for tower in OTHER_TOWERS) else "start"


def _linear_weights(tensor: Header, shape: ModelShape) -> int | None:
    """Weights a tensor of a linear layer stands for, 0 for its scales; None for norms, routers, biases."""
    if tensor.name.endswith(_SIDECARS):
        return 0
    if len(tensor.shape) < 2 or kind_of(tensor.name, 2) != "layer" or "conv1d" in tensor.name:
        return None
    if tensor.dtype == "U8":
        return 2 * tensor.numel
    return tensor.numel * 32 // _bits(shape.quantization) if tensor.dtype == "I32" else tensor.numel


def _bits(quantization: dict[str, Any]) -> int:
    """Bits of one code in a packed 32-bit word."""
    schemes = (group.get("weights") for group in config_groups(quantization))
    settings = (*(scheme for scheme in schemes if isinstance(scheme, dict)), quantization)
    found = (integer(part, key) for part in settings for key in ("num_bits", "bits", "w_bit"))
    return next((bits for bits in found if bits), 4)


def _kept_bytes(tensor: Header) -> int:
    """Bytes after casting: plain FP32 matrices run in 16 bits, per-channel scales in 32."""
    is_scale = tensor.name.endswith(_SIDECARS)
    if tensor.name.endswith(".weight_scale") and tensor.shape[1:] == (1,):
        return 4 * tensor.numel
    return (
        tensor.bytes // 2
        if tensor.dtype == "F32" and len(tensor.shape) >= 2 and not is_scale
        else tensor.bytes
    )


def _share(tensor: Header, shape: ModelShape, tp: int) -> float:
    """Part of a tensor that one of `tp` GPUs keeps."""
    name = tensor.name
    if tp == 1 or tensor.numel <= 1 or any(part in name for part in _REPLICATED):
        return 1.0
    if kind_of(name, 2) == "router" or kind_of(name, 1) == "norm" and len(tensor.shape) == 1:
        return 1.0
    if _ROW_PARALLEL.search(name):
        per_channel = len(tensor.shape) < 2 or tensor.shape[-1] == 1
        added_or_scaled = name.endswith(("bias", "scale", "scale_inv"))
        return 1.0 if added_or_scaled and (per_channel or name.endswith("bias")) else 1 / tp
    if _KEY_VALUE.search(name) and not shape.is_mla:
        return math.ceil(shape.kv_heads / tp) / shape.kv_heads
    return 1 / tp


def _padding(tensor: Header, shape: ModelShape) -> float:
    """Factor by which the engine enlarges a tensor."""
    if ".experts." in tensor.name and tensor.name.endswith(("_blocks", "_scales")):
        return math.ceil(shape.hidden / 256) * 256 / shape.hidden
    if len(tensor.shape) == 2 and tensor.shape[0] == shape.vocab:
        return math.ceil(shape.vocab / 64) * 64 / shape.vocab
    return 1.0


def _rope_bytes(shape: ModelShape) -> int:
    """Tables of cosines and sines, one per GPU."""
    learned = any("embed_positions" in t.name or "wpe" in t.name.split(".") for t in shape.headers)
    if not shape.heads or learned or shape.config.get("alibi") is True:
        return 0
    dims = integer(shape.config, "qk_rope_head_dim") or shape.head_dim * _rotary_share(shape.config)
    # Models with local layers turn those by another base frequency.
    tables = 2 if "rope_local_base_freq" in shape.config else 1
    return round(tables * (shape.max_positions or 0) * dims * 2)


def _rotary_share(config: dict[str, Any]) -> float:
    """The part of a head's width that is rotated."""
    parameters = config.get("rope_parameters")
    inner = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    for factor in (config.get("partial_rotary_factor"), inner):
        if isinstance(factor, int | float) and 0 < factor <= 1:
            return float(factor)
    return 1.0


def _mla_bytes(shape: ModelShape, n_layers: int) -> int:
    """W_UK and W_UV of multi-head latent attention in 16 bits."""
    if not shape.is_mla:
        return 0
    widths = sum(integer(shape.config, key) or 0 for key in ("qk_nope_head_dim", "v_head_dim"))
    return n_layers * shape.heads * widths * (integer(shape.config, "kv_lora_rank") or 0) * 2


def _lora_bytes(shape: ModelShape, n_layers: int, tp: int, rank: int) -> int:
    """One adapter's slots in 16 bits: A is divided in row-parallel layers, B in the others.

    vLLM reserves them for every linear layer it can adapt, experts included, and for the two vocabulary
    matrices (`lora_a_stacked`, `lora_b_stacked` in vllm/lora/layers).
    """
    hidden, inner = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    experts = next((n for k in EXPERT_COUNTS if (n := integer(shape.config, k))), 0)
    if experts:
        inner = integer(shape.config, "moe_intermediate_size") or inner
    attention = 3 * hidden + (query + 2 * key) // tp + query // tp + hidden
    mlp = max(1, experts) * (2 * hidden + 2 * inner // tp + inner // tp + hidden)
    vocabulary = 2 * (hidden + shape.vocab // tp)
    return 2 * rank * (n_layers * (attention + mlp) + vocabulary)
