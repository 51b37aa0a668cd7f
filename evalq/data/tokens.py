"""A token stream: the ids every model is scored on, made once and kept in the store."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evalq.data.windows import StreamFacts
from evalq.engine.backend import Ids
from evalq.files import write_atomic

PROBE_CHARACTERS = 2000
# Digits, runs of spaces, accents, scripts and code: where pre-tokenizers of one family differ.
PROBE_EXTRA = "\n 1234567 don't  DON'T\t x = [3.14,  'ä', \"naïve\"]; Ωmega 日本語 emoji 🙂\r\n\n  end "


@dataclass(frozen=True)
class TokenStream:
    """Ids and what their tokenizer said.

    Args:
        ids_N: int64 [N].
        sha256: of ids_N as little-endian int64.
        facts: sizes and special tokens.
        probe_text: a text for checking another tokenizer against this one.
        probe_ids: its ids, without special tokens.
        prefix_ids: the chat template's opening, when the data spec asks for one.
        mask_N: which tokens count, bool [N]; None where all do.
        stop_ids: tokens that end an answer, of a stream of prompts.
        bytes_N: bytes of the text that each token stands for, int64 [N]; None where they are not known.
        bytes_unknown: why they are not; None where nobody has asked yet.
    """

    ids_N: Ids
    sha256: str
    facts: StreamFacts
    probe_text: str
    probe_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()
    mask_N: NDArray[np.bool_] | None = None
    stop_ids: tuple[int, ...] = ()
    bytes_N: NDArray[np.int64] | None = None
    bytes_unknown: str | None = None


def write_stream(
    path: Path,
    ids_N: Ids,
    described: dict[str, Any],
    mask_N: NDArray[np.bool_] | None = None,
    bytes_N: NDArray[np.int64] | None = None,
) -> None:
    """Keep a token stream.

    Args:
        path: its file.
        ids_N: int64 [N].
        described: what `_Described` holds.
        mask_N: which tokens count, bool [N]; None where all do.
        bytes_N: bytes of the text that each token stands for, int64 [N]; None where they are not known.
    """
    tensors = {"ids": np.asarray(ids_N, np.int64)}
    if mask_N is not None:
        tensors["mask"] = mask_N.astype(np.uint8)
    if bytes_N is not None:
        tensors["bytes"] = np.asarray(bytes_N, np.int64)
    write_atomic(path, save(tensors, {"described": json.dumps(described)}))


class _Described(BaseModel):
    """What stands beside the ids in a stream's file."""

    facts: StreamFacts
    probe_text: str
    probe_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    stop_ids: tuple[int, ...] = ()
    bytes_unknown: str | None = None


def read_stream(path: Path) -> TokenStream | None:
    """A kept token stream, None when it is missing, damaged or contradicts itself."""
    try:
        with safe_open(path, framework="numpy") as file:
            ids = file.get_tensor("ids")
            mask = file.get_tensor("mask").astype(bool) if "mask" in file.keys() else None  # noqa: SIM118
            n_bytes = file.get_tensor("bytes") if "bytes" in file.keys() else None  # noqa: SIM118
            described = _Described.model_validate_json(file.metadata()["described"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    facts = described.facts
    if ids.dtype != np.int64 or ids.ndim != 1 or len(ids) != facts.n_tokens:
        return None
    if mask is not None and mask.shape != ids.shape:
        return None
    if n_bytes is not None and (n_bytes.dtype != np.int64 or n_bytes.shape != ids.shape):
        return None
    return TokenStream(
        ids,
        _sha256(ids),
        facts,
        described.probe_text,
        described.probe_ids,
        described.prefix_ids,
        mask,
        described.stop_ids,
        n_bytes,
        described.bytes_unknown,
    )


def _sha256(ids_N: Ids) -> str:
    return hashlib.sha256(ids_N.astype("<i8").tobytes()).hexdigest()


def cut(stream: TokenStream, max_tokens: int | None) -> TokenStream:
    """Only the first `max_tokens` tokens of a stream."""
    if max_tokens is None or max_tokens >= len(stream.ids_N):
        return stream
    ids = stream.ids_N[:max_tokens]
    ends = tuple(end for end in stream.facts.document_ends if end < max_tokens)
    facts = asdict(stream.facts) | {
        "n_tokens": max_tokens,
        "document_ends": (*ends, max_tokens) if stream.facts.document_ends else (),
    }
    return TokenStream(
        ids,
        _sha256(ids),
        StreamFacts(**facts),
        stream.probe_text,
        stream.probe_ids,
        stream.prefix_ids,
        None if stream.mask_N is None else stream.mask_N[:max_tokens],
        stream.stop_ids,
        None if stream.bytes_N is None else stream.bytes_N[:max_tokens],
        stream.bytes_unknown,
    )
