"""A data spec -> the text it names, built as the protocol's tool builds it (`evalq.data.rows`).

Where texts come from: `text_files` (files, folders), `tables` (.jsonl, .parquet), `hub_sets` (the hub).
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from evalq.data.chat import FORM, Message, as_document, conversation, prompts, require_answers, said
from evalq.data.detokenize import detokenize, word_count
from evalq.data.found import Found, names_of
from evalq.data.hub_sets import Fetched, fetch, read
from evalq.data.rows import build, check_wikitext2, file_from_rows
from evalq.data.tables import Column, read_table
from evalq.data.text_files import read_folder, read_text
from evalq.data.windows import ProtocolSettings, protocol_named
from evalq.errors import DataError
from evalq.files import write_atomic
from evalq.spec import DataSpec
from evalq.spec.base import shown
from evalq.spec.texts import HUB, SEPARATOR, TEXT, HubSet, NamedText, is_table


@dataclass(frozen=True)
class Text:
    """What is tokenized.

    Args:
        name: "wiki2", "sample", or the file's name.
        documents: one string, or one per page for protocols that score pages.
        sha256: of the documents, each ended by a zero byte.
        bytes_per_document: UTF-8 bytes of each original (not detokenized) document.
        words_per_document: whitespace words of each original document.
        origin: where it came from, for the record.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    bytes_per_document: tuple[int, ...]
    words_per_document: tuple[int, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)


def load_text(spec: DataSpec, kept: Path, offline: bool) -> Text:
    """The data spec's text, built as its protocol wants it.

    Args:
        spec: of the data.
        kept: folder of what was fetched from the hub.
        offline: never use the network.

    Raises:
        DataError: the text cannot be had, or is none.
    """
    builder = protocol_named(spec.protocol).text
    if builder == "conversations":
        chats = load_chats(spec, kept, offline)
        if spec.generate is not None:
            n = spec.generate.n
            asked = prompts(chats.conversations[:n], chats.places[:n])
            return chat_text(replace(chats, conversations=tuple(asked)))
        require_answers(chats.conversations, chats.places)
        return chat_text(chats)
    found = find_text(spec, kept, offline)
    originals = build(builder, found)
    # WikiText's own detokenizer: documents from elsewhere are scored as they are.
    pages = builder == "documents" and found.lines
    documents = tuple(detokenize(page) for page in originals) if pages else originals
    if not any(document.strip() for document in documents):
        raise DataError(f"the text {found.name} is empty", "take another text")
    for document in documents:
        _require_utf8(document, found.name)
    return Text(
        found.name,
        documents,
        text_digest(documents),
        tuple(len(page.encode()) for page in originals),
        tuple(word_count(page) for page in originals),
        found.origin,
    )


@dataclass(frozen=True)
class Chats:
    """Conversations as they were found.

    Args:
        name: in records and messages.
        conversations: at least one.
        places: where each stands, as an error names it.
        origin: where they came from, for the record.
    """

    name: str
    conversations: tuple[list[Message], ...]
    places: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)


def load_chats(spec: DataSpec, kept: Path, offline: bool) -> Chats:
    """The conversations of a data spec, a row of a table each. Raises as `load_text`."""
    if not is_column(spec):
        named = spec.path or ", ".join(spec.paths or []) or spec.dataset
        raise DataError(f"conversations are rows of a table, {shown(named)} is none", FORM)
    column, origin = load_column(spec, kept, offline)
    name = spec.dataset_name if spec.named_text is not None else _name_of_table(spec)
    rows = zip(column.values, column.places, strict=True)
    return Chats(name, tuple(conversation(value, place) for value, place in rows), column.places, origin)


def chat_text(chats: Chats) -> Text:
    """Conversations, or prompts, as a text, with bytes and words of what the assistant says."""
    documents = tuple(map(as_document, chats.conversations))
    answers = tuple(map(said, chats.conversations))
    return Text(
        chats.name,
        documents,
        text_digest(documents),
        tuple(len(answer.encode()) for answer in answers),
        tuple(word_count(answer) for answer in answers),
        chats.origin,
    )


def text_digest(documents: Iterable[str]) -> str:
    """SHA-256 (hex) of documents, each ended by a zero byte."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def find_text(spec: DataSpec, kept: Path, offline: bool) -> Found:
    """The text before a protocol's tool builds anything of it. Raises as `load_text`."""
    named = spec.named_text
    if spec.dataset_name == "wiki2":
        return Found("wiki2", (_wikitext2(spec, kept, offline),), lines=True)
    if is_column(spec):
        return _documents_of(spec, kept, offline)
    if named is not None:
        return _shipped(spec.dataset_name, named)
    return _files(spec)


def is_column(spec: DataSpec) -> bool:
    """Whether the text is a column of a table, a document a row."""
    named = spec.named_text
    if named is not None:
        return isinstance(named.source, HubSet) or is_table(named.source)
    return spec.dataset == HUB or (spec.glob is None and is_table((spec.paths or [spec.path or ""])[0]))


def load_column(spec: DataSpec, kept: Path, offline: bool) -> tuple[Column, Mapping[str, Any]]:
    """The column that holds the text, of a spec for which `is_column`, and where it came from.

    Its values are as the table has them: strings, or for conversations lists of messages.

    Raises:
        DataError: the table cannot be had, has no row or no such column.
    """
    named = spec.named_text
    if named is not None and isinstance(named.source, str):
        return read_table(_data_folder() / named.source, named.column), {}
    if spec.dataset == TEXT:
        tables = [spec.local(name) for name in spec.paths or [spec.path or ""]]
        columns = [read_table(path, spec.text_column, spec.rows) for path in tables]
        values = tuple(value for column in columns for value in column.values)
        places = tuple(place for column in columns for place in column.places)
        return Column(values, places, columns[0].name), {}
    asked = named.source if named is not None and isinstance(named.source, HubSet) else _hub_set(spec)
    if spec.path is not None:  # a local copy of a named text
        return read_table(spec.local(spec.path), asked.column, asked.rows), {}
    fetched = fetch(asked, kept, offline)
    return fetched.column, fetched.origin(asked)


def _documents_of(spec: DataSpec, kept: Path, offline: bool) -> Found:
    column, origin = load_column(spec, kept, offline)
    texts, named = column.texts(), spec.named_text
    if named is not None and named.lines:
        return Found(spec.dataset_name, (file_from_rows(texts),), lines=True, origin=origin)
    separator = SEPARATOR if named is None else named.separator
    name = spec.dataset_name if named is not None else _name_of_table(spec)
    return Found(
        name, texts, separator=separator if spec.separator is None else spec.separator, origin=origin
    )


def _name_of_table(spec: DataSpec) -> str:
    if spec.dataset == TEXT:
        return names_of([Path(name).name for name in spec.paths or [spec.path or ""]])
    return " ".join(filter(None, (spec.name, spec.config, spec.split)))


def _hub_set(spec: DataSpec) -> HubSet:
    name = spec.name or ""
    folder = spec.local(name)
    return HubSet(
        name=str(folder.resolve()) if folder.is_dir() else name,
        config=spec.config,
        split=spec.split or "test",
        column=spec.text_column,
        revision=spec.revision,
        rows=spec.rows,
    )


def _files(spec: DataSpec) -> Found:
    """The texts of dataset "text" that are no tables."""
    separator = SEPARATOR if spec.separator is None else spec.separator
    if spec.paths is not None:
        documents = tuple(read_text(spec.local(name), spec.encoding) for name in spec.paths)
        return Found(names_of([Path(name).name for name in spec.paths]), documents, separator=separator)
    path = spec.local(spec.path or "")
    if spec.glob is None:
        return Found(path.name, (read_text(path, spec.encoding),), lines=True)
    folder = read_folder(path, spec.glob, spec.encoding)
    origin = {"files": len(folder.documents), "left_out": folder.left_out}
    name = f"{path.resolve().name}/{spec.glob}"
    return Found(name, folder.documents, separator=separator, origin=origin)


def _shipped(name: str, named: NamedText) -> Found:
    path = _data_folder() / str(named.source)
    if path.is_dir():
        return Found(name, read_folder(path, "*").documents, separator=named.separator)
    return Found(name, (read_text(path),), lines=named.lines)


def _data_folder() -> Path:
    return Path(str(resources.files("evalq.data")))


def _require_utf8(document: str, name: str) -> None:
    """Raise DataError for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        what = f"the text {name} holds half of a surrogate pair at character {error.start}"
        raise DataError(what, "correct it: it is no Unicode text") from None


def _wikitext2(spec: DataSpec, kept: Path, offline: bool) -> str:
    """A local copy, the store's, or the hub's, and always checked to be the one that papers quote."""
    named = spec.path or os.environ.get("EVALQ_WIKITEXT2")
    if named:
        text = read_text(spec.local(named) if spec.path else Path(named), spec.encoding)
        check_wikitext2(text)
        return text
    file = kept / "wiki.test.raw"
    if file.is_file():
        text = read_text(file)
        check_wikitext2(text)
        return text
    text = file_from_rows(_wikitext2_of_hub(spec, offline).column.texts())
    check_wikitext2(text)
    write_atomic(file, text.encode())
    return text


def _wikitext2_of_hub(spec: DataSpec, offline: bool) -> Fetched:
    remedy = (
        'set "path" in the data spec or $EVALQ_WIKITEXT2 to the original wiki.test.raw, run once with a '
        'network, or use dataset "sample", which ships with evalq'
    )
    if offline:
        raise DataError("WikiText-2 is not on this machine", remedy)
    named = spec.named_text
    assert named is not None and isinstance(named.source, HubSet), "it is a data set of the hub"
    try:
        return read(named.source, offline)
    except DataError as error:
        raise DataError(f"WikiText-2 cannot be fetched: {error.message}", remedy) from None


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
