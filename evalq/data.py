"""A data spec -> a text -> a token stream that every model is scored on.

The text is built from rows as the protocol's tool builds it (`evalq.texts.build`). It is tokenized once, in a
process of its own, by the data spec's tokenizer, and kept in the store; engines are fed ids and never
tokenize. The SHA-256 of text and ids go into every record.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evalq.backend import Ids
from evalq.errors import DataError
from evalq.spec import DataSpec
from evalq.store import Store, write_atomic
from evalq.texts.build import BUILDERS, check_wikitext2, file_from_rows
from evalq.texts.detokenize import detokenize, word_count
from evalq.windows import ProtocolSettings, StreamFacts, protocol_named

PROBE_CHARACTERS = 2000
# Digits, runs of spaces, accents, scripts and code: where pre-tokenizers of one family differ.
PROBE_EXTRA = "\n 1234567 don't  DON'T\t x = [3.14,  'ä', \"naïve\"]; Ωmega 日本語 emoji 🙂\r\n\n  end "


@dataclass(frozen=True)
class Text:
    """What is tokenized.

    Args:
        name: "wiki2", "sample", or the file's name.
        documents: one string, or one per page for protocols that score pages.
        sha256: of the documents, each ended by a zero byte.
        bytes_per_document: UTF-8 bytes of each original (not detokenized) document.
        words_per_document: whitespace words of each original document.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    bytes_per_document: tuple[int, ...]
    words_per_document: tuple[int, ...]


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
    """

    ids_N: Ids
    sha256: str
    facts: StreamFacts
    probe_text: str
    probe_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()


def load_text(spec: DataSpec, store: Store, offline: bool) -> Text:
    """The data spec's text, built as its protocol wants it. Raises DataError."""
    raw = _raw_text(spec, store, offline)
    builder = protocol_named(spec.protocol).text
    originals = BUILDERS[builder](raw)
    documents = tuple(detokenize(page) for page in originals) if builder == "documents" else originals
    if not any(document.strip() for document in documents):
        raise DataError(f"the text of dataset {spec.dataset} is empty")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    name = Path(spec.path or "").name if spec.dataset == "text" else spec.dataset_name
    return Text(
        name,
        documents,
        digest.hexdigest(),
        tuple(len(page.encode()) for page in originals),
        tuple(word_count(page) for page in originals),
    )


def _raw_text(spec: DataSpec, store: Store, offline: bool) -> str:
    if spec.dataset == "sample":
        return resources.files("evalq.texts").joinpath("sample.txt").read_text(encoding="utf-8")
    if spec.dataset == "text":
        return _read(spec.local(spec.path or ""))
    text = _wikitext2(spec, store, offline)
    check_wikitext2(text)
    return text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _wikitext2(spec: DataSpec, store: Store, offline: bool) -> str:
    named = spec.path or os.environ.get("EVALQ_WIKITEXT2")
    if named:
        return _read(spec.local(named) if spec.path else Path(named))
    kept = store.root / "texts" / "wiki.test.raw"
    if kept.is_file():
        return _read(kept)
    remedy = (
        'set "path" in the data spec or $EVALQ_WIKITEXT2 to the original wiki.test.raw, run once with a '
        'network, or use dataset "sample", which ships with evalq'
    )
    if offline:
        raise DataError("WikiText-2 is not on this machine", remedy)
    try:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except ImportError:
        raise DataError(
            "WikiText-2 is not on this machine", f'pip install "evalq[data]", or {remedy}'
        ) from None
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"WikiText-2 cannot be fetched from huggingface.co: {first[0][:200]}", remedy
        ) from None
    text = file_from_rows(list(rows))
    check_wikitext2(text)
    write_atomic(kept, text.encode())
    return text


def stream_key(text: Text, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What a token stream depends on: the store's key for it."""
    return {"kind": "tokens", "text": text.sha256, "tokenizer": tokenizer}


def write_stream(path: Path, ids_N: Ids, described: dict[str, Any]) -> None:
    """Keep a token stream. `described` holds the fields of StreamFacts, probe_text, probe_ids, prefix_ids."""
    write_atomic(path, save({"ids": np.asarray(ids_N, np.int64)}, {"described": json.dumps(described)}))


def read_stream(path: Path) -> TokenStream | None:
    """A kept token stream, None when it is missing or broken."""
    try:
        with safe_open(path, framework="numpy") as file:
            ids = file.get_tensor("ids")
            described = json.loads(file.metadata()["described"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    facts = described["facts"]
    facts["document_ends"] = tuple(facts["document_ends"])
    return TokenStream(
        ids,
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        StreamFacts(**facts),
        described["probe_text"],
        tuple(described["probe_ids"]),
        tuple(described["prefix_ids"]),
    )


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
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        StreamFacts(**facts),
        stream.probe_text,
        stream.probe_ids,
        stream.prefix_ids,
    )


def settings_of(spec: DataSpec, prefix_ids: tuple[int, ...] = ()) -> ProtocolSettings:
    """The data spec's protocol with its defaults filled in. Raises SpecError for an unknown protocol."""
    protocol = protocol_named(spec.protocol)
    return ProtocolSettings(
        name=spec.protocol,
        eval_len=spec.eval_len or protocol.default_eval_len,
        eval_stride=spec.eval_stride,
        max_rows=spec.max_rows or None,
        bos=spec.bos,
        warmup_tokens=spec.warmup_tokens,
        prefix_ids=prefix_ids,
    )
