r"""From a file's text to what a protocol tokenizes, and the facts that tell WikiText-2 from other texts.

Convention: rows are those of the Hugging Face data set `Salesforce/wikitext`: one per line of the file, a
blank line is "", any other keeps its "\n". Builders take the whole file's text, because rows cannot tell a
blank line that holds a space (as WikiText's do) from one that does not.

Pages are cut as `EleutherAI/wikitext_document_level` cuts them, the data set of lm-evaluation-harness' task
`wikitext`: https://huggingface.co/datasets/EleutherAI/wikitext_document_level
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evalq.data.found import Found
from evalq.data.protocols import TextBuilder
from evalq.errors import DataError


@dataclass(frozen=True)
class TextFacts:
    """What is known of a published text.

    Args:
        n_rows: rows of the data set.
        n_rows_nonblank: of these, rows that are not "".
        n_bytes: UTF-8 bytes of the file.
        n_pages: pages as lm-evaluation-harness cuts them.
        n_words: runs of non-whitespace characters.
        sha256: of the file's bytes.
    """

    n_rows: int
    n_rows_nonblank: int
    n_bytes: int
    n_pages: int
    n_words: int
    sha256: str


WIKITEXT2_TEST = TextFacts(
    n_rows=4358,
    n_rows_nonblank=2891,
    n_bytes=1_290_590,
    n_pages=62,
    n_words=241_211,
    sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
)


def rows_from_file(text: str) -> list[str]:
    """The data set's rows. A last line without its newline stays without."""
    lines = text.split("\n")
    last = lines.pop()
    rows = [f"{line}\n" if line.strip() else "" for line in lines]
    return [*rows, last if last.strip() else ""] if last else rows


def file_from_rows(rows: Sequence[str]) -> str:
    """The file that WikiText rows came from, where a blank line holds one space."""
    return "".join(row or " \n" for row in rows)


def joined(text: str) -> tuple[str, ...]:
    r"""All rows, blank ones too, with "\n\n" between, as the GPTQ scripts and transformers' guide do."""
    return ("\n\n".join(rows_from_file(text)),)


def joined_nonblank(text: str) -> tuple[str, ...]:
    r"""The rows that are not blank with "\n\n" between, as exllamav3's qbench does."""
    return ("\n\n".join(row for row in rows_from_file(text) if row),)


def whole_file(text: str) -> tuple[str, ...]:
    """The file without its last newline, as llama.cpp's -f reads it."""
    return (text.removesuffix("\n"),)


def pages(text: str) -> tuple[str, ...]:
    r"""The articles, each from its heading line to the newline before the next heading.

    A heading is a line that is " = Title = " with single equals signs. Like the data set's script this also
    takes two lines of one article on electronics (" = 1 henry and capacitance C = ") for headings, which is
    how the test split comes to 62 pages of 60 articles. What stands before the first heading is a page too
    unless it is blank.
    """
    cut: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_heading(line):
            cut.append([])
        cut[-1].append(line)
    return tuple(page for page in map("\n".join, cut) if page.strip())


def _is_heading(line: str) -> bool:
    """Whether a line starts a page; "= = Section = =" is none, its equals signs being joined."""
    shown = line.replace("= = =", "===").replace("= =", "==").strip()
    return shown.startswith("= ") and shown.endswith(" =")


BUILDERS: dict[TextBuilder, Callable[[str], tuple[str, ...]]] = {
    "joined": joined,
    "joined-nonblank": joined_nonblank,
    "file": whole_file,
    "documents": pages,
}


def build(builder: TextBuilder, found: Found) -> tuple[str, ...]:
    """What a protocol tokenizes of a text.

    A file of lines is built as WikiText is (`BUILDERS`). Documents are what WikiText's rows are to the tools:
    they are joined by their separator, blank ones too ("joined") or not ("joined-nonblank"), the whole
    without its last newline ("file"); for protocols that score pages each is a page unless it is blank.
    """
    if found.lines:
        return BUILDERS[builder](found.documents[0])
    kept = tuple(document for document in found.documents if document.strip())
    if builder == "documents":
        return kept
    whole = found.separator.join(kept if builder == "joined-nonblank" else found.documents)
    return whole_file(whole) if builder == "file" else (whole,)


def facts_of(text: str) -> TextFacts:
    """Count and hash a text."""
    rows = rows_from_file(text)
    encoded = text.encode()
    return TextFacts(
        n_rows=len(rows),
        n_rows_nonblank=sum(1 for row in rows if row),
        n_bytes=len(encoded),
        n_pages=len(pages(text)),
        n_words=len(text.split()),
        sha256=hashlib.sha256(encoded).hexdigest(),
    )


def check_wikitext2(text: str) -> None:
    """Raise DataError, naming what differs, unless this is the WikiText-2 raw test split byte for byte."""
    found, known = facts_of(text), WIKITEXT2_TEST
    if found == known:
        return
    named = {
        "rows": (found.n_rows, known.n_rows),
        "non-blank rows": (found.n_rows_nonblank, known.n_rows_nonblank),
        "bytes": (found.n_bytes, known.n_bytes),
        "pages": (found.n_pages, known.n_pages),
        "words": (found.n_words, known.n_words),
    }
    differences = [
        f"{mine:,} {what} instead of {right:,}" for what, (mine, right) in named.items() if mine != right
    ]
    if not differences:
        differences = [f"SHA-256 {found.sha256[:12]}... instead of {known.sha256[:12]}..."]
    if text.replace("\r\n", "\n") != text:
        differences.append("lines end with CR LF")
    raise DataError(
        f"this is not the WikiText-2 raw test split: {', '.join(differences)}",
        'take the original wiki.test.raw, or score the file as dataset "text"',
    )
