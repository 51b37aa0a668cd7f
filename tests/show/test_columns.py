"""Tables in the room there is: text and numbers whole, minor columns left out by name."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from evalq.show.columns import ALWAYS, MAJOR, MINOR, Column, markdown_table, print_columns

HEADERS = ("model", "bpw", "head", "GiB", "PPL", "±", "tok/s", "status")
PRIORITIES = (ALWAYS, MAJOR, MINOR + 1, MINOR, ALWAYS, MAJOR, MINOR + 2, MAJOR)
NUMBERS = ("16.000", "16.000", "14.957", "1,234.5678", "≥12.345", "155,055", "ok, note 1")
LONG = "Llama-3.1-8B-Instruct GPTQ-INT4 group 128 act-order"


def columns() -> list[Column[tuple[str, ...]]]:
    return [
        Column(name, lambda row, i=i: row[i], priority, right=0 < i < 7)  # type: ignore[misc]
        for i, (name, priority) in enumerate(zip(HEADERS, PRIORITIES, strict=True))
    ]


def shown(labels: list[str], width: int, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    print_columns([(label, *NUMBERS) for label in labels], columns(), console)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("label", ["BF16", LONG, "x" * 79, "模型" * 20])
def test_labels_and_perplexities_are_whole_in_80_columns(label: str) -> None:
    lines = shown([label, "BF16"], 80)
    text = "\n".join(lines)
    assert label in text and text.count("1,234.5678") == 2 and text.count("≥12.345") == 2
    assert all(cell_len(line) <= 80 for line in lines)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160])
def test_every_column_is_there_or_named(width: int) -> None:
    lines = shown([LONG], width)
    text = "\n".join(lines)
    assert LONG in text and "1,234.5678" in text
    left_out = next((line for line in lines if line.startswith("no room for: ")), "")
    for name in HEADERS:
        assert (name in text.replace(left_out, "")) != (name in left_out.partition("(")[0]), name


def test_the_most_dispensable_go_first() -> None:
    assert "no room for: tok/s (" in "\n".join(shown(["A label of 20 chars."], 85))
    assert "no room for: head, tok/s (" in "\n".join(shown(["A label of 20 chars."], 75))


def test_outside_a_terminal_nothing_is_cut() -> None:
    lines = shown(["x" * 300], 80, terminal=False)
    assert len(lines) == 3 and all(text in lines[2] for text in ("x" * 300, *NUMBERS))


def test_sentences_fold() -> None:
    out = io.StringIO()
    sentence = " ".join(["word"] * 40)
    rows = [Column[str]("name", lambda row: row), Column[str]("why", lambda row: sentence, folds=True)]
    print_columns(["hf"], rows, Console(file=out, width=80, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert out.getvalue().count("word") == 40 and all(len(line) <= 80 for line in lines)


@given(st.text("\x1b[31m\u202e\n\r\t|ab :[]/", max_size=30), st.integers(10, 200))
def test_cells_are_shown_and_never_obeyed(label: str, width: int) -> None:
    text = "\n".join(shown([f"[red]{label}[/] :dog:"], width))
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text and "[/] :dog:" in text


def test_markdown_headers_are_cells_too() -> None:
    table = markdown_table(["a|b"], [Column[str]("x|\ny", lambda row: row, right=True)])
    assert table == "| x\\| y |\n| ---: |\n| a\\|b |\n"
