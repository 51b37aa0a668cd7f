"""EXL3 (exllamav3) checkpoints: what their headers mean beyond bytes.

A trellis holds K bits per weight of a matrix whose sides are padded to multiples of 128. `config.json`'s
"bits" is what was asked for; the K of the layers is what was made. Source: exllamav3 `doc/exl3.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evalq.storage.report import TensorBits, percent
from evalq.storage.shards import RawTensor

_PAD = 128


def format_line(tensors: Sequence[TensorBits]) -> str:
    """The mean K of the layers ("EXL3 4.0 bpw"), and the share of layers that are not EXL3."""
    layers = [t for t in tensors if t.kind == "layer"]
    coded = [(t.numel, int(t.format.partition("K=")[2])) for t in layers if t.format.startswith("EXL3 K=")]
    weights = sum(numel for numel, _ in coded)
    if not weights:
        return "EXL3"
    mean_bits = sum(numel * bits for numel, bits in coded) / weights
    line = f"EXL3 {round(mean_bits, 2):.2f}".removesuffix("0") + " bpw"
    rest = 1 - weights / sum(t.numel for t in layers)
    return f"{line}, unquantized {percent(rest)}" if rest > 0 else line


def true_layer_weights(
    tensors: Mapping[str, RawTensor], bits: Sequence[TensorBits], config: dict[str, Any]
) -> int | None:
    """How many weights the layers have without padding.

    Returns:
        The count, or None when config.json does not tell the shape of every quantized layer.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    sizes = _sizes(text or {})
    total = 0
    for weight in bits:
        if weight.kind != "layer":
            continue
        trellis = tensors.get(weight.name.removesuffix(".weight") + ".trellis")
        true = weight.numel if trellis is None else _true_numel(weight.name, trellis, sizes)
        if true is None:
            return None
        total += true
    return total


def _sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Possible true lengths of the named sides; several where layers differ (experts)."""

    def number(key: str) -> int:
        value = config.get(key)
        return value if type(value) is int and value > 0 else 0

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") or (hidden // heads if heads else 0)
    kv_heads = number("num_key_value_heads") or heads
    moe = number("moe_intermediate_size")
    inner = (
        number("intermediate_size"),
        moe,
        number("shared_expert_intermediate_size"),
        moe * number("n_shared_experts"),
    )
    return {
        "hidden": (hidden,),
        "query": (heads * head_dim,),
        "key": (kv_heads * head_dim,),
        "inner": tuple(n for n in dict.fromkeys(inner) if n),
    }


# Module name -> its (in, out) sides.
_SIDES = {
    "q_proj": ("hidden", "query"), "k_proj": ("hidden", "key"), "v_proj": ("hidden", "key"),
    "o_proj": ("query", "hidden"), "gate_proj": ("hidden", "inner"), "up_proj": ("hidden", "inner"),
    "down_proj": ("inner", "hidden"), "w1": ("hidden", "inner"), "w3": ("hidden", "inner"),
    "w2": ("inner", "hidden"),
}  # fmt: skip


def _true_numel(name: str, trellis: RawTensor, sizes: dict[str, tuple[int, ...]]) -> int | None:
    """Weights of one layer without padding, None unless exactly one true shape pads to the stored one."""
    sides = _SIDES.get(name.split(".")[-2])
    if sides is None:
        return None
    numel = 1
    for side, tiles in zip(sides, trellis.shape[:2], strict=True):
        fitting = [n for n in sizes[side] if -(-n // _PAD) * _PAD == 16 * tiles]
        if len(fitting) != 1:
            return None
        numel *= fitting[0]
    return numel
