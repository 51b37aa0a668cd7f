"""Safetensors on disk: which files make a checkpoint, and their headers, strictly checked.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, that
much JSON, then the tensors' bytes without holes. Files come from strangers, so every length is compared
with the file's size before anything of that length is read.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from evalq.checkpoint.damage import clipped, corrupt, missing, pickled

INDEX_NAME = "model.safetensors.index.json"
HEADER_BYTES_MAX = 100_000_000  # the safetensors library's own limit
JSON_BYTES_MAX = 256 * 2**20
DIMENSIONS_MAX = 16
NESTING_MAX = 64
FILE_NAME_BYTES_MAX = 255
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pth", "*.pt", "*.ckpt", "*.bin")

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_SCALAR_CODES = {
    "BF16": "H",
    "F32": "f",
    "F64": "d",
    "F16": "e",
    "I32": "i",
    "I64": "q",
    "U32": "I",
    "U64": "Q",
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as the header describes it; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int

    @property
    def numel(self) -> int:
        """Elements as stored, before any unpacking."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardSet:
    """The weight files of a checkpoint directory.

    Args:
        files: every shard, sorted by name.
        index: the index file, or None for a checkpoint without one.
        weight_map: tensor name -> file name as the index says; empty without an index.
    """

    files: tuple[Path, ...]
    index: Path | None
    weight_map: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: model_corrupt, with line and column, if it is none.
    """
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise corrupt(path, f"larger than {JSON_BYTES_MAX // 2**20} MiB: no JSON of a model")
        value = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise corrupt(path, f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise corrupt(path, f"broken JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"broken JSON: {clipped(str(error))}") from None
    except OSError as error:
        raise corrupt(path, f"cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise corrupt(path, f"holds a JSON {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(NESTING_MAX):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise corrupt(path, f"nests deeper than {NESTING_MAX} levels: no JSON of a model")


def _members(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; JSON's escapes can spell half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def find_shards(directory: Path) -> ShardSet:
    """Find a checkpoint's weight files: those of the index, else model.safetensors, else all of them.

    Raises:
        ModelError: model_missing without weights, unsafe_checkpoint with pickles only, model_corrupt for an
            index that names a missing file or one outside the directory.
    """
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    chosen = [p for p in indexes if p.name == INDEX_NAME] or indexes[:1]
    if chosen:
        weight_map = _weight_map(chosen[0])
        files = tuple(directory / name for name in sorted(set(weight_map.values())))
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise corrupt(chosen[0], f"names {absent[0]}, which is not there{more}", "missing-shard")
        return ShardSet(files, chosen[0], weight_map)
    single = directory / "model.safetensors"
    found = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    found = [p for p in found if p.is_file() and not p.name.startswith("adapter_")]
    if not found:
        raise _no_weights(directory)
    return ShardSet(tuple(found), None, {})


def _weight_map(index: Path) -> dict[str, str]:
    """The index's tensor -> file table, with names that cannot leave the directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(index, 'has no "weight_map"')
    for name in set(map(str, weight_map.values())):
        inside = not set("/\\\0") & set(name) and not name.startswith("..")
        possible = _is_text(name) and len(name.encode()) <= FILE_NAME_BYTES_MAX
        if not (possible and inside and name.endswith(".safetensors")):
            raise corrupt(index, f'names the shard "{clipped(name)}": no safetensors file of this directory')
    return {str(tensor): str(file) for tensor, file in weight_map.items()}


def _no_weights(directory: Path) -> Exception:
    """Say what a directory holds instead of weights."""
    for pattern in _PICKLES:
        pickles = sorted(directory.glob(pattern))
        if pickles:
            return pickled(pickles[0], directory, pattern)
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs:
        return missing(directory, "holds GGUF files", f"name the file itself, such as {ggufs[0]}")
    if (directory / "adapter_config.json").is_file():
        return missing(directory, "holds a LoRA adapter, not a model", "name the base model's directory")
    return missing(directory, f"neither {INDEX_NAME} nor *.safetensors nor *.gguf in this directory")


def read_header(path: Path) -> list[RawTensor]:
    """Read and check the header of one safetensors file.

    Raises:
        ModelError: model_corrupt, naming the file and the first thing wrong with it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                what = f"truncated: {size} bytes are too few for a safetensors file"
                raise corrupt(path, what, "truncated-shard")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(HEADER_BYTES_MAX, size - 8):
                raise corrupt(path, f"its header claims {length:,} bytes; the file has {size:,}")
            text = file.read(length)
    except OSError as error:
        raise corrupt(path, f"cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise corrupt(path, f"its header is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its header is broken JSON: {clipped(str(error))}") from None
    if not isinstance(header, dict):
        raise corrupt(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = [parse_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    _require_no_holes(path, tensors, 8 + length, size)
    return tensors


def parse_entry(path: Path, name: str, entry: Any, data_start: int) -> RawTensor:
    """Check one header entry; `data_start` is where the file's tensors begin. Raises ModelError."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        # More dimensions or larger numbers than any tensor has would make the product below expensive.
        sane = isinstance(shape, list) and len(shape) <= DIMENSIONS_MAX
        sane = sane and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane or not _is_text(name):
        raise corrupt(path, f'the header\'s entry for "{clipped(name)}" is not dtype, shape, data_offsets')
    if math.prod(shape) * bits != 8 * (end - begin):
        raise corrupt(path, f'"{clipped(name)}": {dtype} {shape} does not fill bytes {begin} to {end}')
    return RawTensor(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _require_no_holes(path: Path, tensors: list[RawTensor], data_start: int, size: int) -> None:
    """Check that the tensors follow one another from the header to the end of the file."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset != position:
            raise corrupt(path, f'"{clipped(tensor.name)}" overlaps its neighbour or leaves a hole')
        position += tensor.bytes
    if position > size:
        what = f"truncated: its header describes {position:,} bytes, the file has {size:,}"
        raise corrupt(path, what, "truncated-shard")
    if position < size:
        raise corrupt(path, f"{size - position:,} bytes after the last tensor belong to none")


def read_tensors(shards: ShardSet) -> dict[str, RawTensor]:
    """Read the headers of all shards; the index decides between two tensors of one name.

    Raises:
        ModelError: model_corrupt for a broken header or an index whose tensors are not where it says.
    """
    tensors: dict[str, RawTensor] = {}
    for file in shards.files:
        for tensor in read_header(file):
            if tensor.name not in tensors or shards.weight_map.get(tensor.name) == file.name:
                tensors[tensor.name] = tensor
    for name, file_name in shards.weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            what = f'lacks "{clipped(name)}", which the index puts here'
            raise corrupt(shards.files[0].parent / file_name, what, "missing-tensor")
    return tensors


def read_scalars(tensors: Iterable[RawTensor], count_max: int = 8) -> dict[str, tuple[float, ...]]:
    """Read the values of very small tensors, by name; every file is opened once.

    Raises:
        ModelError: model_corrupt if one is not small, not numeric or cannot be read.
    """
    values: dict[str, tuple[float, ...]] = {}
    for path, group in groupby(sorted(tensors, key=lambda t: (t.file, t.offset)), key=lambda t: t.file):
        try:
            with path.open("rb") as file:
                for tensor in group:
                    code = _SCALAR_CODES.get(tensor.dtype)
                    if code is None or tensor.numel > count_max:
                        what = f"{tensor.dtype} {list(tensor.shape)}"
                        raise corrupt(path, f'"{clipped(tensor.name)}": {what} is no scalar')
                    file.seek(tensor.offset)
                    words = struct.unpack(f"<{tensor.numel}{code}", file.read(tensor.bytes))
                    values[tensor.name] = tuple(map(_of_bfloat16, words)) if tensor.dtype == "BF16" else words
        except (OSError, struct.error) as error:
            raise corrupt(path, f"cannot be read: {error}") from None
    return values


def _of_bfloat16(word: int) -> float:
    """The upper half of a float32."""
    value: float = struct.unpack("<f", struct.pack("<I", word << 16))[0]
    return value
