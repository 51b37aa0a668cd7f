"""From data specs to texts: how each protocol's tool joins documents, and texts that ship with evalq."""

import json
from pathlib import Path
from typing import Any

import pytest

from evalq.data.protocols import PROTOCOLS
from evalq.data.sources import Text, load_text
from evalq.errors import DataError
from evalq.spec import DataSpec

DOCUMENTS = ["one\ntwo\n", " \n", "three ( 3 ) \n"]


def load(**spec: Any) -> Text:
    return load_text(DataSpec(**spec), Path("texts"), offline=True)


@pytest.fixture
def table() -> dict[str, Any]:
    Path("t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return {"dataset": "text", "path": "t.jsonl"}


@pytest.mark.parametrize(
    ("builder", "documents"),
    [
        ("joined", ("one\ntwo\n\n\n \n\n\nthree ( 3 ) \n",)),
        ("joined-nonblank", ("one\ntwo\n\n\nthree ( 3 ) \n",)),
        ("file", ("one\ntwo\n\n\n \n\n\nthree ( 3 ) ",)),
        ("documents", ("one\ntwo\n", "three ( 3 ) \n")),
    ],
)
def test_documents_become_a_text_as_each_tool_joins_rows(
    table: dict[str, Any], builder: str, documents: tuple[str, ...]
) -> None:
    for name in (name for name, protocol in PROTOCOLS.items() if protocol.text == builder):
        text = load(**table, protocol=name)
        assert text.documents == documents
        assert text.bytes_per_document == tuple(len(document) for document in documents), "none is rewritten"


def test_a_separator_of_ones_own(table: dict[str, Any]) -> None:
    assert load(**table, separator=" ", rows=1).documents == ("one\ntwo\n",)
    assert load(**table, separator="<|eot|>", protocol="qbench").documents == (
        "one\ntwo\n<|eot|>three ( 3 ) \n",
    )
    assert load(**table, separator="").documents == ("".join(DOCUMENTS),)


def test_several_files_are_documents_and_one_file_is_lines() -> None:
    Path("a.txt").write_text("a\nb\n")
    Path("c.txt").write_text("c\n")
    assert load(dataset="text", path="a.txt").documents == ("a\n\n\nb\n",), "as WikiText's rows are joined"
    assert load(dataset="text", paths=["a.txt"]).documents == ("a\nb\n",)
    several = load(dataset="text", paths=["c.txt", "a.txt"], separator="--")
    assert several.documents == ("c\n--a\nb\n",), "in the order of the spec"
    assert several.name == "c.txt, a.txt"


def test_several_tables_are_one(table: dict[str, Any]) -> None:
    Path("u.jsonl").write_text('{"text": "four"}\n')
    text = load(dataset="text", paths=["t.jsonl", "u.jsonl"], protocol="lm-eval")
    assert text.documents == ("one\ntwo\n", "three ( 3 ) \n", "four") and text.name == "t.jsonl, u.jsonl"


def test_a_folder_by_glob(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", ".hidden.py"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_text(f"# {name}\n")
    text = load(dataset="text", path="src", glob="*.py")
    assert text.documents == ("# a.py\n\n\n# b.py\n",) and text.name == "src/*.py"
    assert text.origin == {"files": 2, "left_out": {"hidden": 1}}


def test_a_local_copy_of_a_named_text() -> None:
    rows = "".join(json.dumps({"sentence": f"s {i}", "text": f"t {i}"}) + "\n" for i in range(1200))
    Path("copy.jsonl").write_text(rows)
    assert load(dataset="ptb", path="copy.jsonl").documents == (" ".join(f"s {i}" for i in range(1200)),)
    c4 = load(dataset="c4", path="copy.jsonl")
    assert c4.documents == (" ".join(f"t {i}" for i in range(1100)),) and c4.name == "c4"


def test_what_ships() -> None:
    many = load(dataset="sample-multilingual", protocol="lm-eval")
    assert len(many.documents) == 10
    code = load(dataset="sample-code", protocol="lm-eval")
    assert len(code.documents) == 7 and code.documents[0].startswith("#!/usr/bin/env bash\n")
    assert load(dataset="sample-code", protocol="llama.cpp").documents[0].count("\n\n\n") >= 6


@pytest.mark.parametrize(
    ("files", "spec", "message"),
    [
        ({"a.txt": " \n"}, {"path": "a.txt"}, "the text a.txt is empty"),
        ({"a.txt": "", "b.txt": ""}, {"paths": ["a.txt", "b.txt"]}, "the text a.txt, b.txt is empty"),
        ({"a.jsonl": '{"text": " "}'}, {"path": "a.jsonl"}, "the text a.jsonl is empty"),
        ({"a.jsonl": '{"text": "\\ud83d"}'}, {"path": "a.jsonl"}, "half of a surrogate pair"),
        ({}, {"path": "."}, "is a folder .*glob"),
        ({}, {"paths": ["no.txt"]}, "cannot read the text .*no.txt"),
    ],
)
def test_texts_that_are_none(files: dict[str, str], spec: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        Path(name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(dataset="text", **spec)
    assert "\n" not in str(caught.value)
