"""Tensors of an open safetensors file, read without mapping it into memory."""

from io import BufferedReader
from typing import Any

from evalq.checkpoint.damage import clipped, corrupt
from evalq.checkpoint.shards import RawTensor
from evalq.errors import ModelError

# safetensors' names -> torch's.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_tensor(file: BufferedReader, tensor: RawTensor) -> Any:
    """Read one tensor as its header describes it.

    Args:
        file: the file that holds it, open for reading.
        tensor: which.

    Returns:
        A torch tensor with memory of its own.

    Raises:
        ModelError: model_corrupt for a file that ends too early, unsupported_format for a dtype that torch
            does not have.
    """
    import torch

    if tensor.dtype not in _DTYPES:
        what = f'{tensor.file}: "{clipped(tensor.name)}" is {tensor.dtype}, which cannot be read here'
        raise ModelError(what, "unsupported_format")
    dtype = getattr(torch, _DTYPES[tensor.dtype])
    if not tensor.bytes:
        if max(tensor.shape, default=0) >= 2**31:
            raise corrupt(tensor.file, f'"{clipped(tensor.name)}" is empty and {list(tensor.shape)}')
        return torch.empty(tensor.shape, dtype=dtype)
    file.seek(tensor.offset)
    data = bytearray(tensor.bytes)
    if file.readinto(data) != tensor.bytes:
        raise corrupt(tensor.file, f'ends within "{clipped(tensor.name)}"')
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)
