"""Bit accounting of GGUF files (llama.cpp), split sets included.

A file's label ("Q4_K_M") names a recipe, not a size: rows that are no multiple of a block fall back to other
types, so the numbers here add up the tensors.
"""

from collections.abc import Sequence
from typing import Any

from evalq.checkpoint.bits import StorageReport, TensorBits, assemble, percent, shares
from evalq.checkpoint.gguf_header import GgufHeader, GgufTensor
from evalq.checkpoint.weight_kinds import kind_of

# llama.cpp stores the second-level scales of NVFP4 beside the weight.
_SIDECARS = (".scale", ".input_scale")


def measure_headers(headers: Sequence[GgufHeader]) -> StorageReport:
    """Measure a GGUF model from the headers of its files, the first of which has the settings."""
    stored = [tensor for header in headers for tensor in header.tensors]
    tensors = _logical_weights(stored)
    return assemble(
        tensors,
        format_line=_format_line(tensors, headers[0].metadata.get("general.file_type")),
        container="gguf",
        disk_bytes=sum(t.bytes for t in stored),
    )


def _logical_weights(stored: Sequence[GgufTensor]) -> tuple[TensorBits, ...]:
    """Every weight with its sidecars' bytes."""
    weights = {t.name for t in stored}
    extra_bytes: dict[str, int] = {}
    owned: set[str] = set()
    for tensor in stored:
        for ending in _SIDECARS:
            owner = tensor.name.removesuffix(ending) + ".weight"
            if tensor.name.endswith(ending) and owner in weights:
                extra_bytes[owner] = extra_bytes.get(owner, 0) + tensor.bytes
                owned.add(tensor.name)
    return tuple(
        TensorBits(
            t.name, kind_of(t.name, len(t.shape)), t.numel, t.bytes + extra_bytes.get(t.name, 0), t.type_name
        )
        for t in stored
        if t.name not in owned
    )


def _format_line(tensors: Sequence[TensorBits], file_type: Any) -> str:
    """The type of the layers ("GGUF Q4_1"), or the recipe and the types it came out as."""
    from gguf.constants import LlamaFileType

    types = shares(tensors)
    if len(types) < 2:
        return f"GGUF {types[0][0]}" if types else "GGUF without layers"
    try:
        recipe = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        recipe = types[0][0]
    return f"GGUF {recipe} ({', '.join(f'{name} {percent(share)}' for name, share in types)})"
