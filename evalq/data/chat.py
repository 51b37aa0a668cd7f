r"""Conversations: how they are read, and which part of a rendered one is the assistant's.

A conversation is a row of a table, {"messages": [{"role": ..., "content": ...}, ...]}, as OpenAI's and
Hugging Face's data sets have them. A content is a text, or a list of parts {"type": "text", "text": ...}.

Where the assistant's text lies in a conversation that a chat template has rendered: the template is rendered
once more with a mark in place of each of the assistant's contents. What stands between the marks must be the
same in both, so that the contents are what is left. A template that adds, drops or moves something by what a
content says is told from one that does not; nothing is guessed.

A token counts when some of it lies in the assistant's text and what lies outside is white space, which
tokenizers with a space at the start of a word make part of the word. So does the token that ends the turn:
the first control token after the content, where nothing but white space is between the two.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.errors import DataError
from evalq.spec.base import shown

Message = dict[str, str]
Span = tuple[int, int]

ASSISTANT = "assistant"
FORM = 'a line holds {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


def conversation(value: Any, where: str) -> list[Message]:
    """A list of messages, each with its role and its content as a text.

    Args:
        value: what a table holds.
        where: the place, for errors.

    Raises:
        DataError: it is no conversation.
    """
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        raise DataError(f"{where} has no messages", FORM)
    return [_message(message, f"{where}, message {i}") for i, message in enumerate(value, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is no JSON object", FORM)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where} has no role", 'roles are "system", "user" and "assistant"')
    text = _text(content, where)
    try:
        f"{role}{text}".encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair", "remove it") from None
    if role == ASSISTANT and not text.strip():
        raise DataError(f"{where}: the assistant says nothing", "remove the turn, or the conversation")
    return {"role": role, "content": text}


def _text(content: Any, where: str) -> str:
    """A content's text; parts of a list are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple | np.ndarray):
        raise DataError(f"{where} has no text as its content", "calls of tools are not scored: remove them")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            remedy = 'only parts {"type": "text", "text": "..."} are taken'
            what = f'of type "{shown(str(kind), 20)}"' if kind != "text" else "without its text"
            raise DataError(f"{where} holds a part {what}", remedy)
        texts.append(text)
    return "".join(texts)


def require_answers(found: Sequence[Sequence[Message]], places: Sequence[str]) -> None:
    """Raise DataError for a conversation in which the assistant has no turn.

    Args:
        found: the conversations.
        places: where each stands.
    """
    for messages, place in zip(found, places, strict=True):
        if not any(message["role"] == ASSISTANT for message in messages):
            roles = ", ".join(dict.fromkeys(shown(message["role"], 20) for message in messages))
            raise DataError(
                f"{place} has no turn of the assistant, so nothing to score (its roles: {roles})",
                'remove it, or have the reference answer all of them: "generate": {}',
            )


def prompts(found: Sequence[Sequence[Message]], places: Sequence[str]) -> list[list[Message]]:
    """What stands before the assistant's first turn of each conversation. Raises DataError for nothing."""
    kept = []
    for messages, place in zip(found, places, strict=True):
        first = next((i for i, m in enumerate(messages) if m["role"] == ASSISTANT), len(messages))
        if not first:
            raise DataError(f"{place} begins with the assistant, so it asks nothing", "begin with the user")
        kept.append(list(messages[:first]))
    return kept


def as_document(messages: Sequence[Message]) -> str:
    """A conversation as one string, the same for equal ones."""
    return json.dumps(list(messages), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def from_document(document: str) -> list[Message]:
    """The conversation of `as_document`."""
    found: list[Message] = json.loads(document)
    return found


def said(messages: Sequence[Message], role: str | None = ASSISTANT) -> str:
    """All that a role says, or (None) everybody, a line break between turns."""
    return "\n".join(m["content"] for m in messages if role in (None, m["role"]))


def marked(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """The conversation with a mark in place of each of the assistant's contents, and the marks.

    A mark is one word that no content holds, so that no template trims, splits or finds anything in it.
    """
    digest = hashlib.sha256(as_document(messages).encode()).hexdigest()[:24]
    marks: list[str] = []
    found = []
    for message in messages:
        if message["role"] == ASSISTANT:
            marks.append(f"answer{len(marks)}x{digest}")
            message = message | {"content": marks[-1]}
        found.append(message)
    return found, marks


def answer_spans(text: str, with_marks: str, marks: Sequence[str], contents: Sequence[str]) -> list[Span]:
    """Where the assistant's contents stand in a rendered conversation.

    Args:
        text: the conversation as its template renders it.
        with_marks: the same with marks in place of the contents.
        marks: in their order.
        contents: what they stand for.

    Returns:
        Start and end of each, in characters; the end is excluded. White space at the ends of a content
        that the template has cut off is not in it.

    Raises:
        ValueError: the template does something else with contents than putting them somewhere.
    """
    rest, between = with_marks, []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("it leaves out what the assistant says")
        between.append(before)
    if any(mark in part for mark in marks for part in (*between, rest)):
        raise ValueError("it repeats what the assistant says, or changes its order")
    between.append(rest)
    spans: list[Span] = []
    at = 0
    for before, content, after in zip(between, contents, between[1:], strict=False):
        start = at + len(before)
        variants = dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
        end = next((start + len(one) for one in variants if text.startswith(one + after, start)), None)
        if not text.startswith(before, at) or end is None:
            raise ValueError("what it writes depends on what the assistant says")
        spans.append((start, end))
        at = end
    if text[at:] != rest:
        raise ValueError("what it writes depends on what the assistant says")
    return spans


def counts(
    text: str, token_spans: Sequence[Span], spans: Iterable[Span], is_control: Sequence[bool]
) -> NDArray[np.bool_]:
    """Which tokens of a rendered conversation are the assistant's, bool [T].

    Args:
        text: the conversation.
        token_spans: where each token stands in it, [T], in order.
        spans: the assistant's parts of it, in order and apart.
        is_control: whether a token is a control token, [T].
    """
    found = np.zeros(len(token_spans), bool)
    for start, end in spans:
        last = None
        for i in _overlapping(token_spans, start, end):
            begin, stop = token_spans[i]
            outside = text[begin : max(begin, start)] + text[min(stop, end) : stop]
            found[i] |= not outside.strip()
            last = i
        if last is not None:
            _end_of_turn(found, last, text, token_spans, is_control)
    return found


def _overlapping(token_spans: Sequence[Span], start: int, end: int) -> Iterator[int]:
    first = np.searchsorted(np.asarray([stop for _, stop in token_spans]), start, side="right")
    for i in range(int(first), len(token_spans)):
        begin, stop = token_spans[i]
        if begin >= end:
            return
        if stop > begin:
            yield i


def _end_of_turn(
    found: NDArray[np.bool_],
    last: int,
    text: str,
    token_spans: Sequence[Span],
    is_control: Sequence[bool],
) -> None:
    """Count the control token that ends a turn, and white space before it."""
    if is_control[last]:
        return  # a template's own marks of generation hold it already
    for i in range(last + 1, len(token_spans)):
        if is_control[i]:
            found[last + 1 : i + 1] = True
            return
        begin, stop = token_spans[i]
        if text[begin:stop].strip():
            return
