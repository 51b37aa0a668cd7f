"""Texts in files and folders: encodings, order, what is left out, and what is said about it."""

import os
from pathlib import Path

import pytest

from evalq.data.text_files import read_folder, read_text
from evalq.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.py", "a.py", "pkg/c.py", "pkg/.git/d.py", ".e.py", "note.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(f"# {name}\n", encoding="utf-8")
    return tmp_path / "src"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert read_text(tmp_path / "a.txt") == "naïve\r\n", "line ends stay"
    (tmp_path / "b.txt").write_bytes("\ufeffnaïve".encode("utf-16-le"))
    assert read_text(tmp_path / "b.txt", "utf-16") == "naïve"


def test_another_encoding_is_named_with_the_byte_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("na\u00efve".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_text(tmp_path / "a.txt")
    assert "a.txt is not UTF-8 text: byte 2 (0xef) cannot be decoded" in caught.value.message
    assert '"encoding": "latin-1"' in (caught.value.remedy or "")
    assert read_text(tmp_path / "a.txt", "latin-1") == "naïve"


def test_utf_16_is_recognised_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match='"encoding": "utf-16"'):
        read_text(tmp_path / "a.txt")


def test_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder.*glob"):
        read_text(tmp_path)
    with pytest.raises(DataError, match="cannot read the text .*none.txt: No such file"):
        read_text(tmp_path / "none.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="is no regular file"):
        read_text(tmp_path / "pipe.txt")


def test_files_of_a_folder_are_sorted_and_hidden_ones_counted(folder: Path) -> None:
    found = read_folder(folder, "**/*.py")
    assert found.documents == ("# a.py\n", "# b.py\n", "# pkg/c.py\n")
    assert found.left_out == {"hidden": 2}


def test_links_binary_and_blank_files_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("password", encoding="utf-8")
    (folder / "z.py").symlink_to(tmp_path / "secret.py")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f.py").write_text("elsewhere", encoding="utf-8")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "bin.py").write_bytes(b"MZ\0\0\x01")
    (folder / "blank.py").write_text(" \n", encoding="utf-8")
    for pattern in ("**/*.py", "*/*.py", "*.py"):
        found = read_folder(folder, pattern)
        assert not any("password" in text or "elsewhere" in text for text in found.documents)
    assert read_folder(folder, "*.py").left_out == {"binary": 1, "blank": 1, "hidden": 1, "links": 1}
    assert read_folder(folder, "*.py").documents == ("# a.py\n", "# b.py\n")


def test_a_linked_folder_may_be_named_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert read_folder(tmp_path / "link", "*.txt").documents == ("# note.txt\n",)


def test_utf_16_is_not_binary(folder: Path) -> None:
    (folder / "wide.md").write_bytes("wide".encode("utf-16"))
    assert read_folder(folder, "*.md", "utf-16").documents == ("wide",)


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("src", "*.rs", 'no text in .*src matches "\\*.rs" \\(correct'),
        ("src", ".*", 'matches "\\.\\*"; left out: 1 hidden'),
        ("src/a.py", "*", "a.py is a file: "),
        ("none", "*", "none does not exist"),
    ],
)
def test_a_folder_without_texts(folder: Path, tmp_path: Path, name: str, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path / name, pattern)
