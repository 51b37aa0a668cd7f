"""The values of scales: zeros, infinities and NaN, read in pieces of bounded size.

A scale that is not a finite number makes its layer's output NaN. A zero scale erases its group, which a
quantizer does to a group of zeros only. Values are looked at as bits, so that formats numpy has no type for
(bfloat16, FP8, E8M0) need no other library. Encodings: IEEE 754, and OCP 8-bit Floating Point 1.0 and
Microscaling Formats 1.0 (https://www.opencompute.org).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from evalq.checkpoint.damage import corrupt
from evalq.checkpoint.expert_scales import EXPERT, experts_line, experts_of
from evalq.checkpoint.findings import Finding, Severity
from evalq.checkpoint.safetensors import Contents
from evalq.checkpoint.shards import RawTensor

_CHUNK_BYTES = 16 * 2**20
_SCALE_ENDS = ("scale", "scale_inv", "scale_2", "scales", "absmax", "SCB", "suh", "svh")
_ZERO_ALLOWED = (".suh", ".svh")  # sign vectors with scales: zero for an input that was always zero


@dataclass(frozen=True)
class _Encoding:
    """Numbers as bits: `magnitude` takes the sign off, what is not finite is at least `not_finite`."""

    words: str
    magnitude: int
    not_finite: int
    has_zero: bool = True


_ENCODINGS = {
    "F64": _Encoding("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": _Encoding("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": _Encoding("<u2", 0x7FFF, 0x7C00),
    "BF16": _Encoding("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": _Encoding("u1", 0x7F, 0x7C),
    "F8_E4M3": _Encoding("u1", 0x7F, 0x7F),
    "F8_E8M0": _Encoding("u1", 0xFF, 0xFF, has_zero=False),
    "U8": _Encoding("u1", 0xFF, 0xFF, has_zero=False),  # E8M0 under its older name
}


def scale_value_findings(contents: Contents) -> Iterator[Finding]:
    """Read every scale of quantized weights, file by file; one finding names all experts with a fault.

    Raises:
        ModelError: model_corrupt if a file cannot be read.
    """
    scales = [
        tensor
        for weight in contents.logical
        if weight.parts is not None
        for ending, tensor in weight.parts.sidecars.items()
        # The scales of scales of bitsandbytes are codes in U8, any of which is valid.
        if ending.endswith(_SCALE_ENDS) and not (tensor.dtype == "U8" and ending.endswith("absmax"))
    ]
    found: list[Finding] = []
    for tensor in sorted(scales, key=attrgetter("file", "offset")):
        encoding = _ENCODINGS.get(tensor.dtype)
        if encoding is not None:
            found += _value_findings(tensor, encoding)
    yield from _experts_together(found, experts_of(contents.tensors))


def _experts_together(found: Sequence[Finding], n_experts: Mapping[str, int]) -> Iterator[Finding]:
    """The findings; a fault that several experts have is one, with its layers and numbers of experts."""
    alike: dict[tuple[str, Severity, str], list[tuple[Finding, str, int]]] = defaultdict(list)
    for finding in found:
        match = EXPERT.fullmatch(finding.tensor)
        if match is None:
            yield finding
        else:
            place = (finding, match["layer"], int(match["expert"]))
            alike[finding.name, finding.severity, match["part"]].append(place)
    for (name, severity, part), places in alike.items():
        first = places[0][0]
        if len(places) == 1:
            yield first
            continue
        layers: dict[str, list[int]] = defaultdict(list)
        for _, layer, expert in places:
            layers[layer].append(expert)
        what = f"{part} of {len(places)} experts ({experts_line(layers, n_experts)}) has the same fault"
        yield Finding(name, first.tensor, f"{first.message}; {what}", severity)


def _value_findings(tensor: RawTensor, encoding: _Encoding) -> Iterator[Finding]:
    zeros = not_finite = 0
    for words in _read(tensor, np.dtype(encoding.words)):
        magnitudes = words & words.dtype.type(encoding.magnitude)
        not_finite += int(np.count_nonzero(magnitudes >= encoding.not_finite))
        zeros += int(np.count_nonzero(magnitudes == 0)) if encoding.has_zero else 0
    if not_finite:
        message = f"{tensor.name} holds {not_finite:,} of {tensor.numel:,} scales that are NaN or infinite"
        yield Finding("scale-not-finite", tensor.name, message, "error")
    if zeros and not tensor.name.endswith(_ZERO_ALLOWED):
        message = f"{tensor.name} holds {zeros:,} of {tensor.numel:,} scales that are zero"
        # Some groups of a layer may be zeros; a whole layer is not.
        severity: Severity = "error" if zeros == tensor.numel else "warning"
        yield Finding("scale-zero", tensor.name, message, severity)


def _read(tensor: RawTensor, dtype: np.dtype[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
    """The tensor's words, _CHUNK_BYTES at a time."""
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            left = tensor.bytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise corrupt(tensor.file, "became shorter while it was read", "truncated-shard")
                left -= len(chunk)
                yield np.frombuffer(chunk, dtype)
    except OSError as error:
        raise corrupt(tensor.file, f"cannot be read: {error.strerror}") from None
