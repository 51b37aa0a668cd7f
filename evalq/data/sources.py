"""A data spec -> the text it names, built from rows as the protocol's tool builds it (`evalq.data.rows`)."""

import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from evalq.data.detokenize import detokenize, word_count
from evalq.data.rows import BUILDERS, check_wikitext2, file_from_rows
from evalq.data.windows import ProtocolSettings, protocol_named
from evalq.errors import DataError
from evalq.files import write_atomic
from evalq.spec import DataSpec


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


def load_text(spec: DataSpec, kept: Path, offline: bool) -> Text:
    """The data spec's text, built as its protocol wants it. Raises DataError."""
    raw = _raw_text(spec, kept, offline)
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


def _raw_text(spec: DataSpec, kept: Path, offline: bool) -> str:
    if spec.dataset == "sample":
        return resources.files("evalq.data").joinpath("sample.txt").read_text(encoding="utf-8")
    if spec.dataset == "text":
        return _read(spec.local(spec.path or ""))
    text = _wikitext2(spec, kept, offline)
    check_wikitext2(text)
    return text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _wikitext2(spec: DataSpec, kept: Path, offline: bool) -> str:
    named = spec.path or os.environ.get("EVALQ_WIKITEXT2")
    if named:
        return _read(spec.local(named) if spec.path else Path(named))
    kept = kept / "wiki.test.raw"
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
