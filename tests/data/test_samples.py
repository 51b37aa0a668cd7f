"""The texts that ship with evalq: long enough, well formed, and with their license."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

SAMPLES = Path(str(resources.files("evalq.data"))) / "samples"
CODE = sorted(path for path in (SAMPLES / "code").iterdir() if path.is_file())
# 8 windows of 512 tokens, the next token of the last one, and a margin.
TOKENS_MIN = 4600


def conversations() -> list[list[dict[str, str]]]:
    lines = (SAMPLES / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_every_conversation_has_turns_in_order() -> None:
    for messages in conversations():
        assert all(set(message) == {"role", "content"} for message in messages)
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["role"] != "system" for message in messages[1:])
        assert all(message["content"].strip() == message["content"] != "" for message in messages)


def test_conversations_differ_in_form() -> None:
    assert len(conversations()) >= 20
    assert sum(messages[0]["role"] == "system" for messages in conversations()) >= 5
    assert sum(len(messages) > 3 for messages in conversations()) >= 10


def test_the_multilingual_sample_has_many_scripts() -> None:
    text = (SAMPLES / "multilingual.txt").read_text(encoding="utf-8")
    for letter in "ßéñя的はةह밤ã":
        assert letter in text


def test_code_is_of_many_languages() -> None:
    assert {path.suffix for path in CODE} == {".c", ".go", ".py", ".rs", ".sh", ".sql", ".ts"}


def test_the_license_stands_beside_the_texts() -> None:
    assert "SPDX-License-Identifier: CC0-1.0" in (SAMPLES / "LICENSE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("sample", ["multilingual", "code", "chat"])
def test_a_sample_is_long_enough(sample: str, smollm2: Callable[[str], Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2("bf16") / "tokenizer.json"))
    text = {
        "multilingual": lambda: (SAMPLES / "multilingual.txt").read_text(encoding="utf-8"),
        "code": lambda: "\n\n".join(path.read_text(encoding="utf-8") for path in CODE),
        "chat": lambda: "\n\n".join(turn["content"] for chat in conversations() for turn in chat),
    }[sample]()
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) >= TOKENS_MIN
