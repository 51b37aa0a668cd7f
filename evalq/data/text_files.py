"""Texts in files: one, several, or those of a folder.

A byte order mark of UTF-8 is part of the encoding and not of the text, so it is dropped. Line ends stay as
they are.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from evalq.errors import DataError

_BOM = b"\xef\xbb\xbf"
# git looks as far for a NUL byte.
_PEEKED_BYTES = 8000


@dataclass(frozen=True)
class Folder:
    """The texts of a folder.

    Args:
        documents: of the files that are texts and not blank, in the order of their names.
        left_out: what kind of file -> how many were left out.
    """

    documents: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A file's text. Raises DataError."""
    return _decoded(read_file(path), path, encoding)


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises DataError for what is no file."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", 'say which of its files with "glob", such as "**/*.txt"')
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file", "name a text file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from None


def read_folder(folder: Path, pattern: str, encoding: str = "utf-8") -> Folder:
    """The texts of a folder's files that match, sorted by their path within it.

    Left out and counted: hidden files, symbolic links (what they lead to may lie elsewhere), files with NUL
    bytes, blank files.

    Raises:
        DataError: no such folder, no text in it, or a file that is not in the encoding.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f'the folder {folder} {what}: "glob" looks in a folder', 'correct "path"')
    left_out: Counter[str] = Counter()
    documents = []
    try:
        matching = sorted(folder.glob(pattern), key=lambda path: path.relative_to(folder).as_posix())
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f'cannot look for "{pattern}" in {folder}: {error}') from None
    whole = folder.resolve()
    for path in matching:
        inner = path.relative_to(folder)
        if os.path.realpath(path) != str(whole / inner):
            left_out["links"] += 1
        elif not path.is_file():
            continue
        elif any(part.startswith(".") for part in inner.parts):
            left_out["hidden"] += 1
        else:
            data = read_file(path)
            if _is_binary(data, encoding):
                left_out["binary"] += 1
                continue
            text = _decoded(data, path, encoding)
            if text.strip():
                documents.append(text)
            else:
                left_out["blank"] += 1
    if not documents:
        besides = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        what = f"; left out: {besides}" if besides else ""
        raise DataError(f'no text in {folder} matches "{pattern}"{what}', 'correct "path" or "glob"')
    return Folder(tuple(documents), dict(sorted(left_out.items())))


def _decoded(data: bytes, path: Path, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{data[error.start]:02x})"
        what = f"{path} is not {encoding.upper()} text: {byte} cannot be decoded"
        guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        remedy = f'save it as UTF-8, or say what it is in the data spec: "encoding": "{guess}"'
        raise DataError(what, remedy) from None
    except UnicodeError as error:  # utf-16 without a byte order mark
        raise DataError(f"{path} is not {encoding.upper()} text: {error}", 'correct "encoding"') from None
    return text.removeprefix("\ufeff") if data.startswith(_BOM) else text


def _is_binary(data: bytes, encoding: str) -> bool:
    """Whether a file is no text; UTF-16 and UTF-32 have NUL bytes in theirs."""
    return "a".encode(encoding) == b"a" and b"\0" in data[:_PEEKED_BYTES]
