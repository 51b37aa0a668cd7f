"""The header of a GGUF file: metadata and tensor descriptions, strictly checked, without the data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Block
sizes come from llama.cpp's own table, `gguf.GGML_QUANT_SIZES`. The reader of the gguf package turns every
token of the vocabulary into arrays, seconds for a large one; this one counts and skips them. Files come from
strangers: every length is compared with what is left of the file before anything of that length is read.
"""

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from evalq.checkpoint.damage import clipped, corrupt, missing

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DIMENSIONS_MAX = 4  # GGML_MAX_DIMS
_NAME_BYTES_MAX = 65535
_VALUE_BYTES_MAX = 2**20  # longer strings (no setting is) are skipped
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_READ_AHEAD = 2**20
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its type's name ("Q4_K"), dimensions (fastest first), bytes, and where they start."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    bytes: int
    offset: int

    @property
    def numel(self) -> int:
        """Weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data.

    Args:
        metadata: scalars and strings by key.
        array_lengths: number of elements of every array by key; the elements themselves are skipped.
        tensors: in the file's order.
    """

    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: tuple[GgufTensor, ...]

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return {tensor.name for tensor in self.tensors}

    def setting(self, name: str) -> Any:
        """The value of "{architecture}.{name}", None when absent."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{name}")


class _Cursor:
    """Reads forward through a file of known size; no read or skip may pass its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self._file = file
        self._block = b""
        self._block_start = 0
        self._position = 0  # inside the block

    @property
    def position(self) -> int:
        """Bytes from the start of the file."""
        return self._block_start + self._position

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.position:
            raise corrupt(
                self.path,
                f"truncated or damaged: {what} claims {count:,} bytes, "
                f"the file ends {self.size - self.position:,} bytes on",
                "truncated-shard",
            )
        if count > len(self._block) - self._position:
            start = self.position
            self._file.seek(start)
            self._block = self._file.read(max(count, _READ_AHEAD))
            self._block_start, self._position = start, 0
            if len(self._block) < count:
                raise corrupt(self.path, "became shorter while it was read")
        taken = self._block[self._position : self._position + count]
        self._position += count
        return taken

    def skip(self, count: int, what: str) -> None:
        """Pass over `count` bytes."""
        if count <= len(self._block) - self._position:
            self._position += count
            return
        if count > self.size - self.position:
            self.take(count, what)
        self._block_start, self._block, self._position = self.position + count, b"", 0

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over `count` strings: the vocabulary, so the one loop here that has to be fast."""
        length_of = struct.Struct("<Q").unpack_from
        while count:
            block, position, last = self._block, self._position, len(self._block) - 8
            while count and position <= last:
                after = position + 8 + length_of(block, position)[0]
                if after > len(block):
                    break
                position, count = after, count - 1
            self._position = position
            if count:  # this one reaches past the block
                self.skip(self.number("Q", what), what)
                count -= 1

    def number(self, code: str, what: str) -> Any:
        """One little-endian number of a struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, bytes_max: int) -> str:
        """A string: 64-bit length, then UTF-8."""
        length = self.number("Q", what)
        if length > bytes_max:
            raise corrupt(self.path, f"{what} claims a length of {length:,} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise corrupt(self.path, f"{what} is not UTF-8 (before byte {self.position:,})") from None


def read_split(path: Path) -> tuple[tuple[Path, ...], tuple[GgufHeader, ...]]:
    """All files of a split set, or the file alone, with their headers.

    Raises:
        ModelError: model_corrupt if a part is missing, damaged or of another model, model_missing if `path`
            is not the first.
    """
    parts = split_names(path)
    for part in parts:
        if not part.is_file():
            raise corrupt(path, f"{part.name} of the same model is not there", "missing-shard")
    headers = tuple(map(read_gguf_header, parts))
    require_one_model(parts, headers)
    return parts, headers


def require_one_model(parts: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Check that files named as parts of one model say so themselves, as llama.cpp's gguf-split writes them.

    Without these settings llama.cpp reads the first file alone, whatever its name says.

    Args:
        parts: in their order.
        headers: of the parts.

    Raises:
        ModelError: model_corrupt, naming the first part that does not belong.
    """
    first, count = headers[0].metadata, len(parts)
    if count == 1 and first.get("split.count", 1) in (0, 1):
        return
    names: set[str] = set()
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        found = header.metadata
        if "split.count" not in found:
            what = (
                f"its name says part {number + 1} of {count}, and it is a whole model (no split.count inside)"
            )
            raise corrupt(part, f"{what}: rename it to score it alone", "split-parts")
        if (found.get("split.no"), found["split.count"]) != (number, count):
            inside = f"split.no {found.get('split.no')} and split.count {found['split.count']}"
            what = f"its name says part {number + 1} of {count}; inside are {clipped(inside)}"
            raise corrupt(part, what, "split-parts")
        for key in ("split.tensors.count", "general.architecture", "general.name"):
            if key in found and key in first and found[key] != first[key]:
                what = f"{key} is {_shown(found[key])}; in {parts[0].name} it is {_shown(first[key])}"
                raise corrupt(part, f"of another model: {what}", "split-parts")
        twice = names & header.names
        if twice:
            what = f'of another model: "{clipped(min(twice))}" is in an earlier part too'
            raise corrupt(part, what, "split-parts")
        names |= header.names
    total = first.get("split.tensors.count")
    if type(total) is int and total != len(names):
        what = f"split.tensors.count is {total}; its {count} parts hold {len(names)} tensors"
        raise corrupt(parts[0], what, "split-parts")


def _shown(value: Any) -> str:
    return clipped(str(value), 40)


def split_names(path: Path) -> tuple[Path, ...]:
    """The files of the split set that a name says it is part of, whether they are there or not.

    Raises:
        ModelError: model_corrupt for a number that cannot be, model_missing if `path` is not the first.
    """
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    parts = int(match["parts"])
    names = [f"{match['stem']}-{n:05d}-of-{match['parts']}.gguf" for n in range(1, parts + 1)]
    if path.name not in names:
        raise corrupt(path, f"there is no part {match['part']} of {match['parts']}")
    if path.name != names[0]:
        raise missing(path, "is not the first part of its model", f"name {path.with_name(names[0])}")
    return tuple(path.with_name(name) for name in names)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of one GGUF file.

    Raises:
        ModelError: model_corrupt, naming the file and the first thing wrong with it.
    """
    try:
        with path.open("rb") as file:
            return parse_gguf_header(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise corrupt(path, f"cannot be read: {error.strerror}") from None


def parse_gguf_header(path: Path, file: BinaryIO, size: int) -> GgufHeader:
    """Read and check the header from an open file, wherever it is.

    Args:
        path: what messages call it.
        file: open for reading, seekable.
        size: of the whole file, bytes.

    Raises:
        ModelError: model_corrupt, naming the first thing wrong with it.
    """
    return _read(_Cursor(path, file, size))


def _read(cursor: _Cursor) -> GgufHeader:
    """The whole header, then the check of the data section's length."""
    magic = cursor.take(4, "the magic number") if cursor.size >= 4 else b""
    if magic != _MAGIC:
        raise corrupt(cursor.path, "not a GGUF file: it does not start with GGUF")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        why = "big-endian" if version and not version & 0xFFFF else f"version {version}"
        raise corrupt(cursor.path, f"a GGUF file of {why}; only little-endian versions 2 and 3 can be read")
    n_tensors = cursor.number("Q", "the number of tensors")
    n_values = cursor.number("Q", "the number of settings")
    # The smallest description takes 24 bytes, the smallest setting 13.
    if 24 * n_tensors + 13 * n_values > cursor.size:
        raise corrupt(
            cursor.path, f"claims {n_tensors:,} tensors and {n_values:,} settings in {cursor.size:,} bytes"
        )
    metadata: dict[str, Any] = {}
    array_lengths: dict[str, int] = {}
    for _ in range(n_values):
        key = cursor.text("a setting's name", _NAME_BYTES_MAX)
        if key in metadata or key in array_lengths:
            raise corrupt(cursor.path, f'the setting "{clipped(key)}" stands twice')
        _read_value(cursor, key, metadata, array_lengths)
    described = [_read_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise corrupt(cursor.path, f"general.alignment is {clipped(str(alignment))}, not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    _require_data(cursor, described, alignment, data_start)
    placed = tuple(replace(tensor, offset=data_start + tensor.offset) for tensor in described)
    return GgufHeader(metadata, array_lengths, placed)


def _read_value(cursor: _Cursor, key: str, metadata: dict[str, Any], array_lengths: dict[str, int]) -> None:
    """One setting into one of the two tables."""
    what = f'the setting "{clipped(key)}"'
    kind = cursor.number("I", what)
    if kind in _SCALARS:
        metadata[key] = cursor.number(_SCALARS[kind], what)
    elif kind == _STRING:
        length = cursor.number("Q", what)
        if length > _VALUE_BYTES_MAX:
            cursor.skip(length, what)
        else:
            metadata[key] = cursor.take(length, what).decode("utf-8", "replace")
    elif kind == _ARRAY:
        element, count = cursor.number("I", what), cursor.number("Q", what)
        array_lengths[key] = count
        if element == _STRING:
            if 8 * count > cursor.size - cursor.position:
                raise corrupt(cursor.path, f"{what} claims {count:,} strings, more than the file holds")
            cursor.skip_strings(count, what)
        elif element in _SCALARS:
            cursor.skip(count * struct.calcsize("<" + _SCALARS[element]), what)
        else:
            raise corrupt(cursor.path, f"{what} is an array of the unknown type {element}")
    else:
        raise corrupt(cursor.path, f"{what} has the unknown type {kind}")


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """One tensor description; its offset counts from the start of the data section."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text("a tensor's name", _NAME_BYTES_MAX)
    what = f'the tensor "{clipped(name)}"'
    dimensions = cursor.number("I", what)
    if dimensions > _DIMENSIONS_MAX:
        raise corrupt(cursor.path, f"{what} claims {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, what))
    type_id = cursor.number("I", what)
    try:
        kind = GGMLQuantizationType(type_id)
        block_weights, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise corrupt(
            cursor.path,
            f"{what} has type {type_id}, which the installed gguf package does not know",
        ) from None
    numel = math.prod(shape)
    columns = shape[0] if shape else 1
    if columns % block_weights:
        raise corrupt(cursor.path, f"{what}: rows of {columns} weights are no whole {kind.name} blocks")
    size = numel // block_weights * block_bytes
    return GgufTensor(name, kind.name, shape, size, cursor.number("Q", what))


def _require_data(cursor: _Cursor, described: list[GgufTensor], alignment: int, data_start: int) -> None:
    """Check that every tensor lies inside the file, aligned, once, and overlaps no other."""
    names: set[str] = set()
    end = 0
    for tensor in sorted(described, key=lambda tensor: (tensor.offset, tensor.bytes)):
        what = f'the tensor "{clipped(tensor.name)}"'
        if tensor.name in names:
            raise corrupt(cursor.path, f"{what} stands twice")
        names.add(tensor.name)
        if tensor.offset % alignment or tensor.offset < end:
            raise corrupt(cursor.path, f"{what} overlaps its neighbour or is not aligned")
        end = tensor.offset + tensor.bytes
        if data_start + end > cursor.size:
            raise corrupt(
                cursor.path,
                f"truncated: {what} ends at byte {data_start + end:,}, the file has {cursor.size:,}",
                "truncated-shard",
            )
