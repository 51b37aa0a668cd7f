"""Help that fits the terminal: what a command is about, and examples with what each of them does."""

import re
import textwrap
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

# An example: indented, then what it does, two spaces or more behind.
_EXAMPLE = re.compile(r"^(\s+\S.*?)\s{2,}(\S.*)$")


class HelpFormatter(RawDescriptionRichHelpFormatter):
    """Descriptions and examples as they are written where there is room, else broken into shorter lines."""

    def add_text(self, text: Any) -> None:
        """Of a parser: its description or its examples."""
        if isinstance(text, str):
            text = fitted(text % {"prog": self._prog}, self._width).replace("%", "%%")
        super().add_text(text)


def fitted(text: str, width: int) -> str:
    """A text with no line longer than `width`, where its words allow it.

    Lines of a paragraph are filled again; an example that is too long has what it does below it.
    """
    lines = text.splitlines()
    if all(len(line) <= width for line in lines):
        return text
    found: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line and not line[0].isspace():
            paragraph.append(line)
            continue
        found += _filled(paragraph, width)
        paragraph = []
        found += _example(line, width)
    return "\n".join(found[:-1])


def _filled(lines: list[str], width: int) -> list[str]:
    """A paragraph; lines of it that are short enough to have been ended on purpose stay apart."""
    if all(len(line) <= width for line in lines):
        return lines
    return textwrap.wrap(" ".join(lines), width, break_long_words=False, break_on_hyphens=False)


def _example(line: str, width: int) -> list[str]:
    parts = _EXAMPLE.match(line)
    if len(line) <= width or parts is None:
        return [line]
    below = textwrap.wrap(
        parts[2], width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False
    )
    return [parts[1], *below]
