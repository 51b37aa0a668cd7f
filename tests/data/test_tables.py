"""Columns of JSON Lines and Parquet: found by name or path, and every fault named with its row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from evalq.data.tables import read_table
from evalq.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": "one", "meta": {"title": "A", "tags": ["x", "y"]}, "a.b": "dotted"},
    {"id": 2, "text": "two\u2028lines", "meta": {"title": "B", "tags": ["z"]}, "a.b": "too"},
    {"id": 3, "text": "", "meta": {"title": "C", "tags": []}, "a.b": ""},
]


@pytest.fixture(params=["t.jsonl", "t.jsonl.gz", "t.json.gz", "t.parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = tmp_path / request.param
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else b"\xef\xbb\xbf" + lines)
    return path


def test_a_column_by_name_and_by_path(table: Path) -> None:
    assert read_table(table).texts() == ("one", "two\u2028lines", "")
    assert read_table(table, "meta.title").texts() == ("A", "B", "C")
    assert read_table(table, "a.b").texts() == ("dotted", "too", ""), "a name with a dot goes first"
    assert read_table(table, "meta.tags", rows=2).values == (["x", "y"], ["z"])
    assert read_table(table, "meta.tags.0", rows=2).texts() == ("x", "z")


def test_only_the_first_rows(table: Path) -> None:
    assert read_table(table, rows=2).texts() == ("one", "two\u2028lines")
    assert read_table(table, rows=99).texts() == ("one", "two\u2028lines", "")


def test_a_missing_column_lists_those_there_are(table: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(table, "body")
    assert 'has no column "body"' in caught.value.message
    assert caught.value.remedy == 'set "column" to one of: id, text, meta, a.b'
    with pytest.raises(DataError, match='has no column "meta.author"'):
        read_table(table, "meta.author")


def test_another_type_is_named_with_its_row(table: Path) -> None:
    for column, what in (("id", "a number"), ("meta", "an object"), ("meta.tags", "a list")):
        with pytest.raises(DataError, match=f'(line|row) 1: column "{column}" holds {what}, not text'):
            read_table(table, column).texts()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it has no row"),
        (b"\n \n", "is empty: it has no row"),
        (b'{"text": "a"}\n\n{"text": null}', 'line 3: column "text" holds null, not text'),
        (b'{"text": "a"}\n{"body": "b"}', 'line 2 has no column "text" \\(set "column" to one of: body'),
        (b'{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8: byte 10 of it \\(0xff\\)"),
        (b'["a"]', "line 1 is a list, not an object"),
        (b'"a"', "line 1 is text, not an object"),
        (b"{}", "the row is an empty object"),
        (b"[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_faults_of_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.jsonl").texts()


def test_rows_behind_those_asked_for_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\nbroken')
    assert read_table(tmp_path / "t.jsonl", rows=1).texts() == ("a",)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.gz"])
def test_a_broken_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format")
    with pytest.raises(DataError, match="cannot read .*t\\.") as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join(json.dumps({"text": "x" * 50 + str(i)}).encode() for i in range(500)))
    (tmp_path / "t.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot read .*after line"):
        read_table(tmp_path / "t.jsonl.gz")


def test_no_file(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.parquet"):
        with pytest.raises(DataError, match="cannot read the text"):
            read_table(tmp_path / name)
