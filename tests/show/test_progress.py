"""Progress: every result can be said, and nothing that a worker says is obeyed."""

import math

import pytest
from result_records import failed, record, terminal
from rich.console import Console

from evalq.results.record import ResultRecord
from evalq.show.progress import ConsoleReporter

EVIL = "\x1b]0;title\x07[red]:dog:\n\u202e"


def said(found: ResultRecord, cached: bool = False, is_terminal: bool = False) -> str:
    def show(console: Console) -> None:
        with ConsoleReporter(console, 1, quiet=False) as reporter:
            reporter.model(found.label, {"sample": 10})
            reporter.event({"event": "loaded", "seconds": 1.0, "device": EVIL})
            reporter.record(found, cached, "sample")

    return terminal(show, 200, is_terminal)


@pytest.mark.parametrize("ppl", [None, math.inf, math.nan, 1e300, 5.0])
def test_every_result_can_be_said(ppl: float | None) -> None:
    out = said(record("a", ppl, tokens_per_second=None))
    assert "[1/1] a: " in out
    assert ("without a perplexity per token" in out) == (ppl is None)


def test_a_text_cut_by_max_tokens_has_no_perplexity_per_word() -> None:
    assert "without a perplexity per word" in said(record("a", 9.0, comparison={"unit": "word"}))


def test_words_of_others_are_shown_and_not_obeyed() -> None:
    out = said(failed(EVIL, EVIL, EVIL))
    assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out
    assert out.count("\\x1b]0;title\\x07[red]:dog:\\n\\u202e") == 4


def test_one_of_several_texts_is_named_with_its_number() -> None:
    def show(console: Console) -> None:
        with ConsoleReporter(console, 5, quiet=False) as reporter:
            reporter.model("INT4", {"wiki2": 20, EVIL: 8})
            reporter.event({"event": "loaded", "seconds": 1.0, "device": "cpu"})
            reporter.event({"event": "text", "name": EVIL})
            reporter.event(
                {"event": "progress", "windows": 4, "of": 8, "tokens": 9, "scored": 9, "seconds": 1.0}
            )
            reporter.record(record("INT4", 5.0), True, "wiki2")
            reporter.record(record("INT4", 6.0), False, EVIL)

    for is_terminal in (False, True):
        out = terminal(show, 200, is_terminal)
        assert "[1/5] INT4, text 1/2 wiki2: PPL 5.0000  (stored)" in out
        assert "[1/5] INT4, text 2/2 \\x1b]0;title" in out and "PPL 6.0000" in out
        assert "\x1b]" not in out
    assert "[1/5] INT4: loaded in 1.0 s on cpu" in terminal(show, 200, False)
