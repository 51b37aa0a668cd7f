"""A GGUF model as a reference: what goes into its head, and the head's place in the file.

llama.cpp hands out the hidden states after the final norm. A plain head (F32, F16, BF16) multiplies them in
its own type, so they are kept in it. A quantized head rounds them block by block, which cannot be made again
from outside: then its logits are kept.
"""

from pathlib import Path
from typing import Any

import numpy as np

from evalq.checkpoint.headers import open_checkpoint
from evalq.engine.reference import (
    DType,
    Float32s,
    NumpyReference,
    Packed,
    ReferenceHead,
    StoredWeight,
    float32_to_bfloat16,
    pack_float32,
    pack_logits,
)

_PLAIN: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The head, or the embedding where it serves as one.
_HEADS = ("output.weight", "token_embd.weight")
# Logits made again in another order of sums differ by rounding; by another formula they differ by far more.
_SAME_LOGITS = 0.02


def hidden_head(path: Path, vocab_size: int) -> ReferenceHead | None:
    """For a model with a plain head; None for a quantized one. Raises ModelError for a damaged file."""
    checkpoint = open_checkpoint(path)
    places = zip(checkpoint.files, checkpoint.gguf, strict=True)
    tensors = {tensor.name: (file, tensor) for file, header in places for tensor in header.tensors}
    name = next((name for name in _HEADS if name in tensors), None)
    if name is None or any(other.startswith("output.") and other not in _HEADS for other in tensors):
        return None  # with a bias, or without a head
    file, tensor = tensors[name]
    dtype = _PLAIN.get(tensor.type_name)
    if dtype is None or len(tensor.shape) != 2 or tensor.shape[1] != vocab_size:
        return None
    return ReferenceHead(
        kind="hidden",
        dtype=dtype,
        width=tensor.shape[0],
        vocab_size=vocab_size,
        weight=StoredWeight.found(file, tensor.offset, dtype, (tensor.shape[1], tensor.shape[0])),
        multiplier=_positive(checkpoint.gguf_setting("logit_scale")) or 1.0,
        soft_cap=_positive(checkpoint.gguf_setting("final_logit_softcapping")),
    )


def gives_again(head: ReferenceHead, hidden_Nd: Float32s, logits_NV: Float32s) -> bool:
    """Whether the model's own logits come out of what is kept: no setting says all that a model does."""
    again = NumpyReference(head).logits(pack(head, hidden_Nd))
    return bool(np.abs(again - logits_NV).max() <= _SAME_LOGITS * max(1.0, float(np.abs(logits_NV).max())))


def pack(head: ReferenceHead, rows: Float32s) -> Packed:
    """What is kept of hidden states [N, d], or of logits [N, V]."""
    if head.kind == "logits":
        return pack_logits(rows)
    if head.dtype == "float32":
        return pack_float32(rows)
    return float32_to_bfloat16(rows) if head.dtype == "bfloat16" else rows.astype(np.float16).view(np.uint16)


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None
