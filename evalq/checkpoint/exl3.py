"""EXL3 (exllamav3) checkpoints: what their headers mean beyond bytes.

A trellis holds K bits per weight of a matrix whose sides are padded to multiples of 128. `config.json`'s
"bits" is what was asked for; the K of the layers is what was made. Source: exllamav3 `doc/exl3.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evalq.checkpoint.bits import TensorBits, percent
from evalq.checkpoint.dimensions import SIDES, side_lengths
from evalq.checkpoint.shards import RawTensor

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
    sizes = side_lengths(text or {})
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


def _true_numel(name: str, trellis: RawTensor, sizes: dict[str, tuple[int, ...]]) -> int | None:
    """Weights of one layer without padding, None unless exactly one true shape pads to the stored one."""
    sides = SIDES.get(name.split(".")[-2])
    if sides is None:
        return None
    numel = 1
    for side, tiles in zip(sides, trellis.shape[:2], strict=True):
        fitting = [n for n in sizes[side] if -(-n // _PAD) * _PAD == 16 * tiles]
        if len(fitting) != 1:
            return None
        numel *= fitting[0]
    return numel
