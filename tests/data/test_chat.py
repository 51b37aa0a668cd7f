"""Conversations: what is read, what is refused, and which tokens are the assistant's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalq.data import chat
from evalq.data.chat import answer_spans, conversation, counts, marked
from evalq.errors import DataError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def test_parts_of_text_are_joined_and_other_keys_left_out() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert conversation([{"role": "user", "content": parts, "name": "x"}], "c") == [
        {"role": "user", "content": "one two"}
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"chat.jsonl line 2 has no messages \("),
        ("hello", "has no messages"),
        (7, "has no messages"),
        (None, "has no messages"),
        ({"role": "user", "content": "x"}, "has no messages"),
        ([7], "chat.jsonl line 2, message 1 is no JSON object"),
        ([{"content": "x"}], "message 1 has no role"),
        ([{"role": " ", "content": "x"}], "message 1 has no role"),
        ([USER, {"role": "user"}], "message 2 has no text as its content"),
        ([{"role": "user", "content": None}], "message 1 has no text as its content .calls of tools"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], 'a part of type "image_url" .only parts'),
        ([{"role": "user", "content": ["x"]}], 'holds a part of type "str"'),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "holds a part without its text"),
        ([{"role": "assistant", "content": " \n"}], "the assistant says nothing"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        conversation(value, "chat.jsonl line 2")


def test_a_conversation_without_answers() -> None:
    found = [[USER, ANSWER], [USER, {"role": "human", "content": "x"}]]
    with pytest.raises(DataError, match="line 9 has no turn of the assistant.*roles: user, human"):
        chat.require_answers(found, ["line 1", "line 9"])


def test_a_prompt_ends_before_the_first_answer() -> None:
    assert chat.prompts([[USER, ANSWER, USER, ANSWER], [USER]], ["a", "b"]) == [[USER], [USER]]
    with pytest.raises(DataError, match="a begins with the assistant"):
        chat.prompts([[ANSWER]], ["a"])


contents = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6
)


def chatml(messages: list[dict[str, str]]) -> str:
    return "".join(f"<s>{m['role']}\n{m['content']}<e>\n" for m in messages)


def trimming(messages: list[dict[str, str]]) -> str:
    return "".join(f"[{m['role']}] {m['content'].strip()} </s>" for m in messages)


def thinking(messages: list[dict[str, str]]) -> str:
    """As Qwen3: an empty thought before the last answer only, so that no prefix renders as it does inside."""
    last = len(messages) - 1
    thoughts = ["<think></think>" if i == last else "" for i in range(len(messages))]
    return "".join(
        f"<s>{m['role']}\n{thought}{m['content']}<e>" for m, thought in zip(messages, thoughts, strict=True)
    )


def merging(messages: list[dict[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages)


@given(turns, st.sampled_from([chatml, trimming, thinking, merging]))
def test_spans_are_the_assistants_contents_whatever_stands_between_them(said: Any, render: Any) -> None:
    messages = [{"role": role, "content": content} for role, content in said]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    text = render(messages)
    with_marks, marks = marked(messages)
    found = [text[a:b] for a, b in answer_spans(text, render(with_marks), marks, answers)]
    wanted = [answer.strip() for answer in answers] if render is trimming else answers
    assert [one.strip() for one in found] == [one.strip() for one in wanted]
    if render is not trimming:
        assert found == wanted


@pytest.mark.parametrize(
    ("render", "why"),
    [
        (lambda ms: "".join(m["content"] for m in ms if m["role"] == "user"), "leaves out"),
        (lambda ms: "".join(m["content"] * 2 for m in ms), "repeats"),
        (lambda ms: "".join(m["content"].upper() for m in ms), "leaves out|depends"),
        (lambda ms: "".join(f"{len(m['content'])}:{m['content']}" for m in ms), "depends"),
        (lambda ms: "".join(m["content"].split("</think>")[-1] for m in ms), "depends"),
        (lambda ms: "".join(m["content"] for m in ms) + str("</think>" in str(ms)), "depends"),
        (lambda ms: "".join(m["content"] for m in reversed(ms)), "repeats|changes|leaves|depends"),
    ],
)
def test_a_template_that_does_more_with_contents_is_told(render: Any, why: str) -> None:
    messages = [USER, {"role": "assistant", "content": "<think>x</think>one"}, USER, ANSWER]
    with_marks, marks = marked(messages)
    answers = ["<think>x</think>one", "A"]
    with pytest.raises(ValueError, match=why):
        answer_spans(render(messages), render(with_marks), marks, answers)


def cut(text: str, *ends: int) -> list[tuple[int, int]]:
    return list(zip((0, *ends), (*ends, len(text)), strict=True))


def test_a_turns_end_counts_and_its_header_does_not() -> None:
    text = "<s>assistant\nHello you<e>\n<s>user"
    tokens = cut(text, 3, 12, 13, 18, 22, 25, 26, 29)
    control = [text[a:b] in ("<s>", "<e>") for a, b in tokens]
    found = counts(text, tokens, [(13, 22)], control)
    assert [text[a:b] for (a, b), kept in zip(tokens, found, strict=True) if kept] == ["Hello", " you", "<e>"]


def test_white_space_before_a_word_or_a_turns_end_does_not_keep_a_token_out() -> None:
    text = "[/INST] Hello </s>[INST] more"
    tokens = [(0, 7), (7, 13), (13, 14), (14, 18), (18, 24), (24, 29)]
    control = [False, False, False, True, False, False]
    assert counts(text, tokens, [(8, 13)], control).tolist() == [False, True, True, True, False, False]


def test_a_token_that_holds_something_of_the_template_does_not_count() -> None:
    text = "Bot:yes.###User:no"
    tokens = cut(text, 3, 6, 10, 11)
    assert [text[a:b] for a, b in tokens] == ["Bot", ":ye", "s.##", "#", "User:no"]
    assert not counts(text, tokens, [(4, 8)], [False] * 5).any()


def test_bytes_of_one_character_count_together() -> None:
    text = "a:日本;"
    tokens = [(0, 2), (2, 3), (2, 3), (2, 3), (3, 4), (4, 5)]
    assert counts(text, tokens, [(2, 4)], [False] * 6).tolist() == [False, True, True, True, True, False]
    assert counts(text, tokens, [], [False] * 6).tolist() == [False] * 6
    assert counts("", [], [(0, 0)], []).dtype == np.bool_
