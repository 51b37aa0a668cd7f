"""Text from elsewhere: nothing of it reaches a terminal, Markdown or a spreadsheet as an order."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from evalq.show.plain import csv_cell, json_text, markdown_cell, plain

FORMULA_STARTS = tuple("=+-@\t\r\n")
texts = st.text(st.characters(), max_size=60) | st.text(
    "\x1b[]0;\x07\x9b31m\u202e|<>&`*_~$\\!()=+-@\t\r\n a1"
)


def cells_of(markdown: str) -> list[str]:
    """Contents of the cells of the body, as HTML."""
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    body = html.partition("<tbody>")[2].partition("</tbody>")[0]
    return [cell.partition("</td>")[0] for cell in body.split("<td>")[1:]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Llama 3.1 Q4_K_M", "Llama 3.1 Q4_K_M"),
        ("模型 ü é\u0301 👩\u200d🔬", "模型 ü é\u0301 👩\u200d🔬"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x9b31mred", "\\x9b31mred"),
        ("\x1b]8;;http://evil\x07link", "\\x1b]8;;http://evil\\x07link"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("a\tb", "a b"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("\u2066x\u2069\u200f\ufeff\u2028", "\\u2066x\\u2069\\u200f\\ufeff\\u2028"),
        ("\udcff.gguf", "\\udcff.gguf"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_plain(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(texts)
def test_plain_is_one_line_that_no_terminal_obeys(text: str) -> None:
    shown = plain(text)
    assert all(c.isprintable() or c in "\u200c\u200d\u3000" or ord(c) > 0x9F for c in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert plain(shown) == shown


@given(texts, texts)
def test_markdown_cells_hold_text_alone(a: str, b: str) -> None:
    table = f"| x | y |\n|---|---|\n| {markdown_cell(a)} | {markdown_cell(b)} |\n"
    cells = cells_of(table)
    assert len(cells) == 2
    assert not any("<" in cell for cell in cells), cells


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "[click](http://evil)",
        "![x](http://evil/x.png)",
        "<http://evil>",
        "`code`",
        "a | b",
        "a \\| b",
        "a\\",
        "**bold** _slanted_ ~~gone~~ __0__ a__b _c_d_",
        "line\n\n# heading",
        "&lt;b&gt;",
    ],
)
def test_markdown_cell_shows_the_text_itself(text: str) -> None:
    (cell, after) = cells_of(f"| x | y |\n|---|---|\n| {markdown_cell(text)} | after |\n")
    shown = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert (shown, after) == (plain(text), "after")


def test_addresses_become_no_links() -> None:
    """GitHub makes links of bare addresses; an entity in the middle keeps it from seeing one."""
    shown = markdown_cell("see https://evil.example and www.evil.example")
    assert "https://" not in shown and "www." not in shown


def test_usual_labels_stay_readable_in_markdown() -> None:
    assert markdown_cell("Llama-3.1 8B Q4_K_M (4.5 bpw)") == "Llama-3.1 8B Q4_K_M (4.5 bpw)"


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-2-3", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"])
def test_csv_cells_are_no_formulas(text: str) -> None:
    assert csv_cell(text).startswith("'")


@pytest.mark.parametrize("value", [-1.5, 0, None, True, "-1.5", "+3", "-inf", "nan", "Q4_K_M", "a=b", "a-b"])
def test_csv_leaves_numbers_and_other_text(value: object) -> None:
    assert csv_cell(value) == value


@given(texts)
def test_csv_cell_never_starts_a_formula(text: str) -> None:
    shown = csv_cell(text)
    try:
        float(shown)
    except ValueError:
        assert not shown.lstrip().startswith(FORMULA_STARTS)


@given(st.dictionaries(texts, texts, max_size=3))
def test_json_is_the_same_value_and_safe(value: dict[str, str]) -> None:
    shown = json_text(value)
    assert json.loads(shown) == value
    shown.encode()
    assert not any(0x7F <= ord(c) <= 0x9F or c in "\x1b\u202e" for c in shown)


def test_json_has_no_word_for_infinity() -> None:
    assert json.loads(json_text({"a": [float("inf"), float("nan"), 1.5]})) == {"a": [None, None, 1.5]}
