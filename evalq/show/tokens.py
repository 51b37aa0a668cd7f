"""The tokens on which a model differs most from the reference: as a table, and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from evalq.results.positions import By, Position
from evalq.results.record import ResultRecord, windows_text
from evalq.show.columns import ALWAYS, MAJOR, MINOR, Column, print_columns
from evalq.show.console import say
from evalq.show.numbers import NOTHING, number
from evalq.show.plain import json_text

_GUESS_CHARACTERS = 10
_BEFORE_CHARACTERS = 60
_HEADERS = {"kld": "KLD", "delta_p": "Δp", "ln_ratio": "ln ratio"}
_DIGITS = {"kld": 4, "delta_p": 4, "ln_ratio": 3}


@dataclass(frozen=True)
class Reading:
    """A position with its text.

    Args:
        at: the numbers.
        before: text in front of the token.
        token: its own text.
        reference_guess: text of the reference's most probable token; None where it is not known.
        model_guess: of the model's.
    """

    at: Position
    before: str
    token: str
    reference_guess: str | None
    model_guess: str | None


@dataclass(frozen=True)
class TokensReport:
    """What `evalq tokens` shows.

    Args:
        model: whose tokens.
        reference: label and key of the model beside which they are.
        by: what they are ordered by.
        readings: the most diverging first.
        why_ids: why ids stand for texts; "" where they do not.
    """

    model: ResultRecord
    reference: ResultRecord
    by: By
    readings: Sequence[Reading]
    why_ids: str


def print_tokens(report: TokensReport, console: Console) -> None:
    """What was compared, the table, what its columns mean."""
    model, reference = report.model.label, report.reference.label
    facts = report.model.comparison
    say(console, (f"{model} beside {reference}: {facts.get('dataset')}, {windows_text(facts)}", "dim"))
    console.print()
    print_columns(report.readings, _columns(report), console)
    console.print()
    lines = [
        f"p ref, p: probability of the »token« by {reference} and by {model}, after all before it",
        "guess: the token that each finds most probable",
    ]
    if not any(one.reference_guess or one.model_guess for one in report.readings):
        lines.pop()
    if report.why_ids:
        lines.append(f"token ids stand for text: {report.why_ids}")
    for line in lines:
        say(console, (line, "dim"))


def _columns(report: TokensReport) -> list[Column[Reading]]:
    """At 80 columns the numbers, the guesses and 24 characters a line of the text."""
    found = [
        _number(report.by, ALWAYS),
        Column[Reading]("p ref", lambda one: f"{one.at.p:.4f}", MAJOR, right=True),
        Column[Reading]("p", lambda one: f"{one.at.q:.4f}", MAJOR, right=True),
        *(_number(by, MINOR) for by in ("kld", "ln_ratio", "delta_p") if by != report.by),
        Column[Reading]("token at", lambda one: f"{one.at.position:,}", MINOR + 1, right=True),
    ]
    if any(one.reference_guess is not None for one in report.readings):
        found.append(Column("ref's guess", lambda one: _short(one.reference_guess), MAJOR))
    if any(one.model_guess is not None for one in report.readings):
        found.append(Column("its guess", lambda one: _short(one.model_guess), MAJOR))
    return [*found, Column("text »token«", _text, ALWAYS, folds=True)]


def _number(by: Any, priority: int) -> Column[Reading]:
    return Column(_HEADERS[by], lambda one: number(getattr(one.at, by), _DIGITS[by]), priority, right=True)


def _short(text: str | None) -> str:
    """A guess in quotes, which show its spaces."""
    if text is None:
        return NOTHING
    return f'"{text if len(text) <= _GUESS_CHARACTERS else text[: _GUESS_CHARACTERS - 1] + "…"}"'


def _text(one: Reading) -> str:
    before = one.before
    cut = before if len(before) <= _BEFORE_CHARACTERS else "…" + before[1 - _BEFORE_CHARACTERS :]
    return f"{cut}»{one.token}«"


def tokens_json(report: TokensReport) -> str:
    """The same as JSON, texts whole."""
    return json_text(
        {
            "label": report.model.label,
            "key": report.model.key,
            "reference": report.reference.label,
            "reference_key": report.reference.key,
            "by": report.by,
            "text_unknown": report.why_ids or None,
            "positions": [_plain(one) for one in report.readings],
        }
    )


def _plain(one: Reading) -> dict[str, Any]:
    at = one.at
    return {
        "position": at.position,
        "window": at.window,
        "before": one.before,
        "token": {"id": at.token, "text": one.token},
        "p_reference": at.p,
        "p_model": at.q,
        "delta_p": at.delta_p,
        "ln_ratio": at.ln_ratio,
        "kld": at.kld,
        "reference_guess": _guess(at.reference_guess, one.reference_guess),
        "model_guess": _guess(at.model_guess, one.model_guess),
    }


def _guess(token: int | None, text: str | None) -> dict[str, Any] | None:
    return None if token is None else {"id": token, "text": text}
