r"""Rows, texts and pages, and WikiText's detokenizer, rule by rule.

Tests that need the real WikiText-2 test split read it from $EVALQ_WIKITEXT2: its license keeps it out.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalq.data.detokenize import detokenize, word_count
from evalq.data.rows import (
    BUILDERS,
    WIKITEXT2_TEST,
    check_wikitext2,
    facts_of,
    file_from_rows,
    rows_from_file,
)
from evalq.data.windows import PROTOCOLS
from evalq.errors import DataError

FILE = " \n = One = \n \n First , page . \n = = Part = = \n \n = Two = \n \n More \n \n"


@pytest.fixture(scope="module")
def wikitext2() -> str:
    path = os.environ.get("EVALQ_WIKITEXT2")
    if not path:
        pytest.skip("set EVALQ_WIKITEXT2 to the original wiki.test.raw to run what needs the real text")
    return Path(path).read_bytes().decode("utf-8")


# --- rows and builders ------------------------------------------------------------------------------------


def test_rows_are_those_of_the_data_set():
    assert rows_from_file(FILE) == [
        "",
        " = One = \n",
        "",
        " First , page . \n",
        " = = Part = = \n",
        "",
        " = Two = \n",
        "",
        " More \n",
        "",
    ]
    assert rows_from_file("a\n\t\n\nb") == ["a\n", "", "", "b"], "a last line without a newline stays so"
    assert rows_from_file("") == []


@given(st.lists(st.sampled_from(["", "a\n", " = B = \n", " c d \n", "\x0b x\n", "\u2028y\n"]), max_size=20))
def test_the_file_and_its_rows_give_each_other_back(rows):
    assert rows_from_file(file_from_rows(rows)) == rows


def test_every_protocols_text_has_a_builder():
    assert {protocol.text for protocol in PROTOCOLS.values()} - {"conversations"} == set(BUILDERS)


def test_builders_by_hand():
    assert BUILDERS["joined"](" A \n \n b \n") == (" A \n\n\n\n\n b \n",)
    assert BUILDERS["joined-nonblank"](" A \n \n b \n") == (" A \n\n\n b \n",)
    assert BUILDERS["file"](" A \n \n b \n") == (" A \n \n b ",)
    assert BUILDERS["file"]("a\n\nb") == ("a\n\nb",), "no newline to take away, blank lines as they are"
    assert BUILDERS["documents"](FILE) == (
        " = One = \n \n First , page . \n = = Part = = \n ",
        " = Two = \n \n More \n \n",
    )


@pytest.mark.parametrize(
    ("line", "starts"),
    [
        (" = Title = ", True),
        ("= Title =", True),
        (" = = Section = = ", False),
        (" = = = Part = = = ", False),
        (" = = = = Detail = = = = ", False),
        (" = 1 henry and capacitance C = ", True),
        (" = no end", False),
        (" = ends otherwise = = =", False),
        ("a = b =", False),
    ],
)
def test_what_starts_a_page(line, starts):
    assert len(BUILDERS["documents"](f"before\n{line}\nafter\n")) == 1 + starts


def test_text_before_the_first_heading_is_a_page_unless_blank():
    assert BUILDERS["documents"]("intro\n = A = \nx") == ("intro", " = A = \nx")
    assert BUILDERS["documents"](" \n\n = A = \nx") == (" = A = \nx",)
    assert BUILDERS["documents"]("no heading at all\n") == ("no heading at all\n",)
    assert BUILDERS["documents"](" \n \n") == ()


@given(st.text(alphabet="= \nab", max_size=60))
def test_pages_lose_nothing_but_blank_ones(text):
    assert "".join("".join(BUILDERS["documents"](text)).split()) == "".join(text.split())
    assert all(page.strip() for page in BUILDERS["documents"](text))


# --- WikiText-2 -------------------------------------------------------------------------------------------


def test_the_real_text_is_recognised(wikitext2):
    check_wikitext2(wikitext2)
    assert facts_of(wikitext2) == WIKITEXT2_TEST


def test_the_real_text_has_62_pages_and_their_words_and_bytes(wikitext2):
    pages = BUILDERS["documents"](wikitext2)
    assert len(pages) == 62
    assert sum(word_count(page) for page in pages) == 241_211 + 2 * 62, (
        "an empty piece at either end of a page"
    )
    # Between pages a newline goes, and the blank first line with it.
    assert sum(len(page.encode()) for page in pages) == 1_290_590 - 61 - len(" \n")
    assert all(page.startswith(" = ") and page.split("\n")[0].endswith(" = ") for page in pages)


def test_the_real_text_survives_its_rows(wikitext2):
    assert file_from_rows(rows_from_file(wikitext2)) == wikitext2
    assert BUILDERS["file"](wikitext2) == (wikitext2[:-1],)


def test_the_real_text_is_detokenized(wikitext2):
    pages = [detokenize(page) for page in BUILDERS["documents"](wikitext2)]
    assert not any(mark in page for page in pages for mark in (" @-@ ", " @,@ ", " , ", " \n", "\n ", " 's"))
    assert all(page.startswith(" = ") and page.split("\n")[0].endswith(" =") for page in pages)


def test_a_changed_byte_is_noticed(wikitext2):
    with pytest.raises(DataError, match="WikiText-2 raw test split: SHA-256 .* instead of 173c87a53759"):
        check_wikitext2(wikitext2.replace("e", "a", 1))


def test_other_line_ends_are_named(wikitext2):
    with pytest.raises(DataError, match="1,294,948 bytes instead of 1,290,590, lines end with CR LF"):
        check_wikitext2(wikitext2.replace("\n", "\r\n"))


def test_another_text_is_refused_with_what_differs():
    with pytest.raises(DataError) as caught:
        check_wikitext2(FILE)
    assert caught.value.message == (
        "this is not the WikiText-2 raw test split: 10 rows instead of 4,358, "
        f"5 non-blank rows instead of 2,891, {len(FILE)} bytes instead of 1,290,590, "
        "2 pages instead of 62, 16 words instead of 241,211"
    )
    assert "wiki.test.raw" in (caught.value.remedy or "")


# --- the detokenizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenized", "expected"),
    [
        ("the boys ' toys", "the boys' toys"),
        ("and/or/' 5/ x", "and/or/'[0-9]/ x"),
        ("a well @-@ known 1 @,@ 234 @.@ 5", "a well-known 1,234.5"),
        ("this : that ; so . And ! Why ? Well , yes", "this: that; so. And! Why? Well, yes"),
        ("end .", "end ."),
        ("film ( 1999 ) here", "film (1999) here"),
        ("( a ) ( b )", "(a) (b)"),
        ("( a ( b ) c )", "(a ( b) c )"),
        ("see [ 1 ] and { x }", "see [1] and {x}"),
        ('a " quoted phrase " b', 'a "quoted phrase" b'),
        ('" one " and " two "', '"one" and "two"'),
        ("a ' quoted ' b", "a 'quoted' b"),
        ("( over\n lines )", "(over\nlines)"),
        (" = = Part = = ", " == Part == "),
        (" = = = Part = = = ", " === Part === "),
        (" = = = = Part = = = = ", " ==== Part ==== "),
        ("20 ° C", "20°C"),
        ("line \n next", "line\nnext"),
        ("heading N of it", "heading 1 of it"),
        ("Teddy 's Story", "Teddy's Story"),
        ("naïve — plain", "naïve — plain"),
        ("", ""),
    ],
)
def test_each_rule(tokenized, expected):
    assert detokenize(tokenized) == expected


def test_rules_apply_in_the_tasks_order():
    """Each of these comes out otherwise when two of the rules change places."""
    assert detokenize("= = = = a") == "==== a", "the longest run of equals signs first"
    assert detokenize("boys ' toys ' x") == "boys'toys' x", "the possessive closes up before quotes pair off"
    assert detokenize("x \n 's") == "x\n's", "the spaces around a line end go before the one before 's"


@pytest.mark.parametrize(
    ("page", "words"), [("a b", 2), (" a b \n", 4), ("", 1), (" \n ", 2), ("a\u00a0b", 2)]
)
def test_words_are_counted_as_the_task_does(page, words):
    assert word_count(page) == words
