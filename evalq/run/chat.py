"""A conversation by a tokenizer's own chat template: its tokens, and which of them are the assistant's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalq.data import chat
from evalq.data.chat import Message, Span
from evalq.engine.backend import Tokenizer
from evalq.errors import ModelError

_OTHER_TEMPLATE = "change the conversation, or set tokenizer_dir to a model with another template"


@dataclass(frozen=True)
class Rendered:
    """A conversation, or a prompt, as tokens.

    Args:
        ids: [T].
        mask: which of them are the assistant's, bool [T].
        ends_with: the control token that ends a turn of the assistant; empty where there is none.
    """

    ids: list[int]
    mask: NDArray[np.bool_]
    ends_with: frozenset[int] = frozenset()


def tokenized_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """A whole conversation.

    Raises:
        ModelError: the template does not tell what the assistant says from its own words, or leaves nothing
            of it. Whatever the template raises passes through.
    """
    text = tokenizer.chat_text(messages)
    spans = tokenizer.chat_answers(messages)
    if spans is None:
        spans = _spans(tokenizer, messages, text)
    encoded = tokenizer.encode_chat(text)
    mask = chat.counts(text, encoded.spans, spans, encoded.is_control)
    if not mask.any():
        what = "the chat template leaves nothing of what the assistant says"
        raise ModelError(what, "tokenizer_mismatch", _OTHER_TEMPLATE)
    last = int(np.flatnonzero(mask)[-1])
    ends_with = {encoded.ids[last]} if encoded.is_control[last] else ()
    return Rendered(encoded.ids, mask, frozenset(ends_with))


def tokenized_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """A conversation up to the start of the assistant's next turn. Raises as `tokenized_chat`."""
    encoded = tokenizer.encode_chat(tokenizer.chat_text(messages, opening=True))
    if not encoded.ids:
        raise ModelError("the chat template writes nothing", "tokenizer_mismatch", _OTHER_TEMPLATE)
    answered = tokenized_chat(tokenizer, [*messages, {"role": chat.ASSISTANT, "content": "Yes."}])
    return Rendered(encoded.ids, np.zeros(len(encoded.ids), bool), answered.ends_with)


def _spans(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[Span]:
    """Raises ModelError where the template does more with contents than putting them somewhere."""
    with_marks, marks = chat.marked(messages)
    contents = [m["content"] for m in messages if m["role"] == chat.ASSISTANT]
    try:
        return chat.answer_spans(text, tokenizer.chat_text(with_marks), marks, contents)
    except ValueError as error:
        raise ModelError(
            f"the chat template does not show which text is the assistant's: {error}",
            "tokenizer_mismatch",
            _OTHER_TEMPLATE,
        ) from None
