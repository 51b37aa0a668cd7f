"""A reference's distributions, kept small: what goes into its head, and where the head lies.

A full distribution is V numbers a token, 300 kB for a vocabulary of 150,000. What goes into the head is d
numbers, 3 kB, and the head is in the reference's own checkpoint. So one row a token is kept, in the data type
that the head multiplies in, and whoever needs the distribution multiplies again: the same numbers times the
same numbers. Where an engine does not show what goes into its head, its logits are kept, 16 bits each.

Rows as they are kept, by `ReferenceHead.dtype` and kind:

    bfloat16, float16   uint16 [R, d], the bits
    float32             uint8 [R, 3 d]: the upper 24 bits of each, rounded (relative error at most 2**-16)
    logits              uint16 [R, V + 4]: lowest + code * step, then these two as float32

Axes in names: R rows (scored tokens), d inputs of the head, V vocabulary.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from evalq.errors import ModelError

Float32s = NDArray[np.float32]
Packed = NDArray[Any]  # uint8 or uint16, [R, width of a row]
DType = Literal["float32", "bfloat16", "float16"]

_CODES = 2**16 - 1
_RANGE_WORDS = 4  # lowest and step, two float32, as uint16
# Rows of the head that numpy multiplies by at once: their float32 copy stays in the cache's reach.
_BLOCK_MIB = 16
_READ_BYTES = 2**24


class StoredWeight(BaseModel):
    """A plain matrix [rows, d], row after row, inside a file.

    Args:
        file: absolute path.
        offset: of its first byte.
        dtype: as stored.
        rows: V, padding included.
        columns: d.
        sha256: of its bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    offset: int
    dtype: DType
    rows: int
    columns: int
    sha256: str

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.rows * self.columns * (4 if self.dtype == "float32" else 2)

    @classmethod
    def at(cls, file: Path, offset: int, dtype: DType, shape: tuple[int, int]) -> "StoredWeight":
        """A matrix in a file, to be looked at before its digest is taken."""
        return cls(
            file=str(file.resolve()), offset=offset, dtype=dtype, rows=shape[0], columns=shape[1], sha256=""
        )

    @classmethod
    def found(cls, file: Path, offset: int, dtype: DType, shape: tuple[int, int]) -> "StoredWeight":
        """A matrix in a file, its digest taken. Raises OSError."""
        return cls.at(file, offset, dtype, shape).with_digest()

    def with_digest(self) -> "StoredWeight":
        """The same with the digest of the bytes that are there. Raises OSError."""
        return self.model_copy(update={"sha256": self.digest_now()})

    def digest_now(self) -> str:
        """SHA-256 (hex) of the bytes that are there. Raises OSError."""
        digest, left = hashlib.sha256(), self.bytes
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            while left and (block := file.read(min(left, _READ_BYTES))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()

    def require(self) -> None:
        """Raise ModelError (model_missing) unless the file still holds these very bytes."""
        try:
            why = "" if self.digest_now() == self.sha256 else "its bytes have changed"
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            raise ModelError(
                f"the head of the reference cannot be read from {self.file}: {why}",
                "model_missing",
                "put the reference's files back, or score the reference again with --clear_cache",
            )

    def mapped(self) -> NDArray[Any]:
        """The matrix [rows, columns] as it lies in the file, bfloat16 as uint16. Raises OSError."""
        dtype = "uint16" if self.dtype == "bfloat16" else self.dtype
        return np.memmap(self.file, dtype, "r", self.offset, (self.rows, self.columns))


class ReferenceHead(BaseModel):
    """How a kept row becomes the reference's logits.

    Args:
        kind: "hidden": the row is what goes into the head; "logits": it is their 16-bit codes.
        dtype: of what goes into the head; the weight is taken in it too.
        width: d.
        vocab_size: V.
        weight: of the head, None for kept logits.
        rounded: the engine's head gives logits in dtype, not in float32.
        multiplier, divisor, soft_cap: what the model does to its logits, in this order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hidden", "logits"]
    dtype: DType
    width: int
    vocab_size: int
    weight: StoredWeight | None = None
    rounded: bool = False
    multiplier: float = 1.0
    divisor: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of_logits(cls, vocab_size: int) -> "ReferenceHead":
        """For a model whose logits are kept."""
        return cls(kind="logits", dtype="float32", width=vocab_size, vocab_size=vocab_size)

    @property
    def row_shape(self) -> tuple[int, str]:
        """Numbers in a kept row, and their data type."""
        if self.kind == "logits":
            return self.vocab_size + _RANGE_WORDS, "uint16"
        return (3 * self.width, "uint8") if self.dtype == "float32" else (self.width, "uint16")

    @property
    def row_bytes(self) -> int:
        """Bytes of a kept row."""
        numbers, dtype = self.row_shape
        return numbers * int(np.dtype(dtype).itemsize)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that the logits depend on; where the head lies is no part of it."""
        where = {"weight": {"file", "offset"}} if self.weight is not None else None
        return hashlib.sha256(self.model_dump_json(exclude=where).encode()).hexdigest()


def pack_float32(rows: Float32s) -> Packed:
    """The upper 24 bits of each number, rounded: float32 [..., d] -> uint8 [..., 3 d]."""
    bits = np.ascontiguousarray(rows, "<f4").view("<u4").astype(np.uint64) + 0x80
    # What rounds beyond the largest number stays as it is.
    upper = (np.minimum(bits, 0xFFFFFFFF) >> 8).astype("<u4")
    octets = upper[..., None].view(np.uint8)[..., :3]
    return np.ascontiguousarray(octets).reshape(*rows.shape[:-1], 3 * rows.shape[-1])


def unpack_float32(packed: Packed) -> Float32s:
    """The inverse of pack_float32, to a relative error of 2**-16."""
    octets = np.zeros((*packed.shape[:-1], packed.shape[-1] // 3, 4), np.uint8)
    octets[..., 1:] = packed.reshape(*packed.shape[:-1], -1, 3)
    return octets.view("<f4")[..., 0]


def pack_logits(logits: Float32s) -> Packed:
    """16-bit codes evenly spaced over each row's own range: float32 [..., V] -> uint16 [..., V + 4].

    Over a range of 40 nats the step is 6e-4, which moves a KL divergence by about 1e-8.
    """
    finite = np.where(np.isfinite(logits), logits, np.nan)
    lowest = np.nan_to_num(np.nanmin(finite, axis=-1, keepdims=True)).astype(np.float32)
    highest = np.nan_to_num(np.nanmax(finite, axis=-1, keepdims=True)).astype(np.float32)
    step = np.maximum((highest - lowest) / _CODES, np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(np.nan_to_num((logits - lowest) / step)), 0, _CODES).astype("<u2")
    ranges = np.concatenate([lowest, step], axis=-1).astype("<f4").view("<u2")
    return np.concatenate([codes, ranges], axis=-1)


def unpack_logits(packed: Packed) -> Float32s:
    """The inverse of pack_logits, to half a step."""
    ranges = np.ascontiguousarray(packed[..., -_RANGE_WORDS:]).view("<f4")
    logits: Float32s = packed[..., :-_RANGE_WORDS].astype(np.float32)
    logits *= ranges[..., 1:]
    logits += ranges[..., :1]
    return logits


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> Float32s:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Float32s) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class NumpyReference:
    """A reference's distributions again, in numpy: for engines without torch."""

    def __init__(self, head: ReferenceHead) -> None:
        """Open the head. Raises ModelError (model_missing) where it is no longer what it was."""
        self.head = head
        if head.weight is not None:
            head.weight.require()

    @cached_property
    def _weight(self) -> NDArray[Any]:
        assert self.head.weight is not None
        return self.head.weight.mapped()

    def logits(self, packed_R: Packed) -> Float32s:
        """Logits of kept rows, float32 [R, V], in memory of their own."""
        head = self.head
        if head.kind == "logits":
            return unpack_logits(packed_R)
        rows_Rd = _as_float32(packed_R, head.dtype)
        logits_RV = np.empty((len(rows_Rd), head.vocab_size), np.float32)
        block = max(1, _BLOCK_MIB * 2**20 // (4 * head.width))
        for first in range(0, head.vocab_size, block):
            some = slice(first, min(first + block, head.vocab_size))
            np.matmul(rows_Rd, self._block(some).T, out=logits_RV[:, some])
        return self._finished(logits_RV)

    def _block(self, rows: slice) -> Float32s:
        """Rows of the weight as float32, rounded to the data type that the head multiplies in."""
        assert self.head.weight is not None
        part = self._weight[rows]
        stored = (
            bfloat16_to_float32(part) if self.head.weight.dtype == "bfloat16" else part.astype(np.float32)
        )
        return stored if self.head.weight.dtype == self.head.dtype else _rounded(stored, self.head.dtype)

    def _finished(self, logits_RV: Float32s) -> Float32s:
        """What the model does to its logits, each step rounded where its engine rounds."""
        head = self.head
        dtype: DType = head.dtype if head.rounded else "float32"
        logits_RV = _rounded(logits_RV, dtype)
        if head.multiplier != 1.0:
            logits_RV = _rounded(logits_RV * np.float32(head.multiplier), dtype)
        if head.divisor != 1.0:
            logits_RV = _rounded(logits_RV / np.float32(head.divisor), dtype)
        if head.soft_cap is not None:
            cap = np.float32(head.soft_cap)
            logits_RV = _rounded(np.tanh(_rounded(logits_RV / cap, dtype)), dtype)
            logits_RV = _rounded(logits_RV * cap, dtype)
        return logits_RV


def _as_float32(packed: Packed, dtype: DType) -> Float32s:
    if dtype == "float32":
        return unpack_float32(packed)
    if dtype == "bfloat16":
        return bfloat16_to_float32(packed)
    return packed.view(np.float16).astype(np.float32)


def _rounded(values: Float32s, dtype: DType) -> Float32s:
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return bfloat16_to_float32(float32_to_bfloat16(values))
