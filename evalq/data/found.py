"""A text as it was found, before a protocol makes of it what it tokenizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evalq.spec.texts import SEPARATOR


@dataclass(frozen=True)
class Found:
    """One file whose lines are rows, as WikiText's are, or documents.

    Args:
        name: in records and messages.
        documents: at least one; only one where `lines`.
        lines: whether the document is a file of lines.
        separator: stands between documents.
        origin: where it came from, for the record: data set, commit, files left out.
    """

    name: str
    documents: tuple[str, ...]
    lines: bool = False
    separator: str = SEPARATOR
    origin: Mapping[str, Any] = field(default_factory=dict)


def names_of(paths: Sequence[str]) -> str:
    """Several files in one short name."""
    return ", ".join(paths) if len(paths) <= 2 else f"{paths[0]} and {len(paths) - 1} more"
