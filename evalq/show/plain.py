r"""Text from elsewhere, made safe to show: labels, file metadata, log lines, an engine's own words.

A terminal obeys escape sequences and characters that turn the direction of writing, Markdown obeys HTML and
links, a spreadsheet runs a cell that begins with `=`. Whatever evalq did not write itself passes through one
of these functions on its way out: `plain` to a terminal, `markdown_cell`, `csv_cell`, `json_text` to files.
What cannot be shown as it is stays visible as its escape, such as \x1b.

Sources: OWASP, "CSV Injection"; CommonMark 0.31, "Backslash escapes"; Unicode Technical Report 36.
"""

import json
import math
import re
import unicodedata
from typing import Any

# Joiners hold emoji and the letters of several scripts together; no other format character is needed.
_JOINERS = "\u200c\u200d"
# Control, format, surrogate, and the separators of lines and paragraphs.
_UNSAFE_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MARKDOWN_ACTIVE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_MARKDOWN_LINK = re.compile(r"(?<=http):(?=//)|(?<=https):(?=//)|(?<=ftp):(?=//)|(?<=www)\.", re.IGNORECASE)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def plain(text: str) -> str:
    r"""One line that a terminal shows and does not obey.

    Control characters (ESC, newline and C1 among them), lone surrogates and characters that turn the
    direction of writing become their escapes, \x1b or \u202e; a tab becomes a space. Other text, of any
    script, stays.
    """
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def markdown_cell(text: str) -> str:
    """Text that stays text in a cell of a Markdown table: it makes no column, line, HTML, link or style."""
    line = plain(text).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKDOWN_ACTIVE.sub(lambda found: "\\" + found.group(), line)
    return _MARKDOWN_LINK.sub(lambda found: f"&#{ord(found.group())};", line)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such text gets an apostrophe before it.

    Numbers, and text that is a number, stay as they are.
    """
    if not isinstance(value, str):
        return value
    formula = value.lstrip(" ").startswith(_FORMULA_STARTS) and not _is_number(value)
    return ("'" if formula else "") + plain(value)


def json_text(value: Any) -> str:
    """JSON with two spaces of indent, readable in any script, safe on a terminal; ends in a newline.

    NaN and infinity, for which JSON has no word, become null.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text + "\n"
    # json escapes C0 itself; what is left stands inside strings, where an escape means the same character.
    shown = (c if c.isprintable() or c == "\n" or c in _JOINERS else json.dumps(c)[1:-1] for c in text)
    return "".join(shown) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _visible(char: str) -> str:
    if char == "\t":
        return " "
    if char in _JOINERS or unicodedata.category(char) not in _UNSAFE_KINDS:
        return char
    if char in "\n\r":
        return "\\n" if char == "\n" else "\\r"
    code = ord(char)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
