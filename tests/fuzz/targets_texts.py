"""Texts of strangers: tables, files of a folder in any encoding, and what a tokenizer makes of them."""

import gzip
import io
import json
import tempfile
from pathlib import Path

from fuzz.harness import Target
from fuzz.mutators import mutate_bytes, mutate_json, mutate_text

from evalq.backends.fake import FakeBackend
from evalq.data.chat import from_document
from evalq.data.sources import load_text
from evalq.data.tables import read_table
from evalq.run.chat import tokenized_chat, tokenized_prompt
from evalq.spec import DataSpec

_ROWS = (
    {
        "id": 1,
        "text": "one\nline",
        "meta": {"tags": ["x", "y"]},
        "messages": [{"role": "user", "content": "hi"}],
    },
    {"id": 2, "text": "", "meta": {"tags": []}, "messages": []},
    {
        "id": 3,
        "text": "naïve 日本 🙂",
        "meta": {"tags": ["z"]},
        "messages": [{"role": "user", "content": ""}],
    },
)


def _lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _ROWS).encode()


def _parquet() -> tuple[bytes, ...]:
    import pyarrow
    from pyarrow import parquet

    files = []
    for compression in ("none", "snappy", "gzip"):
        out = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(list(_ROWS)), out, compression=compression)
        files.append(out.getvalue())
    return tuple(files)


def _read(data: bytes, name: str) -> None:
    """As a table, by two columns, and as the text of a data spec."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        read_table(path, "messages", rows=2)
        read_table(path, "meta.tags.0", rows=1).texts()
        load_text(DataSpec(dataset="text", path=str(path)), Path(folder), offline=True)


def _read_lines(data: bytes) -> None:
    _read(data, "rows.jsonl")


def _read_gzip(data: bytes) -> None:
    _read(data, "rows.jsonl.gz")


def _read_parquet(data: bytes) -> None:
    _read(data, "rows.parquet")


def _read_folder(data: bytes) -> None:
    """The same bytes as files of a folder, in two encodings."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_bytes(data)
        (Path(folder) / "b.txt").write_bytes(b"bb")
        for encoding in ("utf-16", "utf-8"):
            spec = DataSpec(dataset="text", path=folder, glob="*.txt", encoding=encoding, protocol="lm-eval")
            load_text(spec, Path(folder), offline=True)


_CHATS = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes 🙂."}]},
    {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "more", "name": "x"},
            {"role": "assistant", "content": "two"},
        ]
    },
)


def _read_chats(data: bytes) -> None:
    """As prompts and as a text, through a tokenizer with a template, which refuses roles in its own way."""
    tokenizer = FakeBackend().load_tokenizer(Path())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        path.write_bytes(data)
        for tokenized, generate in ((tokenized_prompt, {}), (tokenized_chat, None)):
            raw = {"dataset": "text", "path": str(path), "format": "messages", "generate": generate}
            found = load_text(DataSpec.model_validate(raw), Path(folder), offline=True)
            for document in found.documents:
                try:
                    tokenized(tokenizer, from_document(document))
                except ValueError as error:
                    if not str(error).startswith("no such role"):
                        raise


TARGETS = (
    Target(
        "conversations", lambda: tuple(json.dumps(one).encode() for one in _CHATS), _read_chats, mutate_json
    ),
    Target("rows of JSON Lines", lambda: (_lines(),), _read_lines, mutate_text),
    Target(
        "rows of JSON Lines, gzipped", lambda: (gzip.compress(_lines(), mtime=0),), _read_gzip, mutate_bytes
    ),
    Target("rows of Parquet", _parquet, _read_parquet, mutate_bytes),
    Target("files of a folder", lambda: (_lines(), "wide".encode("utf-16")), _read_folder, mutate_bytes),
)
