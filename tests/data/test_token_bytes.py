"""Bytes of the text for each token: exact, or refused with what the tokenizer changed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalq.data.sources import load_text
from evalq.data.token_bytes import bytes_of_tokens
from evalq.engine.backend import Piece
from evalq.engine.registry import backend
from evalq.errors import DataError
from evalq.spec import DataSpec

BOS = Piece(b"<s>", special=True)


def pieces(*texts: str) -> list[Piece]:
    return [Piece(text.encode()) for text in texts]


def test_pieces_that_make_up_the_text() -> None:
    assert bytes_of_tokens("naïve x", pieces("na", "ï", "ve", " x")).tolist() == [2, 2, 2, 2]


def test_parts_of_a_character_count_their_own_bytes() -> None:
    first, last = "日".encode()[:1], "日".encode()[1:]
    assert bytes_of_tokens("日", [Piece(first), Piece(last)]).tolist() == [1, 2]


def test_special_tokens_count_only_where_the_text_holds_them() -> None:
    assert bytes_of_tokens("ab", [BOS, *pieces("ab"), BOS]).tolist() == [0, 2, 0]
    assert bytes_of_tokens("a<s>b", [BOS, *pieces("a"), BOS, *pieces("b")]).tolist() == [0, 1, 3, 1]


def test_the_space_that_a_tokenizer_puts_before_a_text_is_not_the_texts() -> None:
    assert bytes_of_tokens("the end", [BOS, *pieces(" the", " end")]).tolist() == [0, 3, 4]
    assert bytes_of_tokens(" the", pieces(" ", " the")).tolist() == [0, 4]
    with pytest.raises(DataError, match="at byte 3"):
        bytes_of_tokens("the end", pieces("the", "  end"))


@pytest.mark.parametrize(
    ("text", "found", "message"),
    [
        ("Abc", ("abc",), "changes the text before it cuts it: b'Abc' at byte 0 became b'abc'"),
        ("abc", ("ab",), "b'c' at byte 2 became b''"),
        ("ab", ("ab", "c"), "b'' at byte 2 became b'c'"),
    ],
)
def test_a_tokenizer_that_changes_the_text(text: str, found: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        bytes_of_tokens(text, pieces(*found))
    assert message in caught.value.message


@given(st.text(max_size=60))
def test_the_bytes_of_all_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = backend("fake").load_tokenizer(Path("x"), False)
    if any(0xD800 <= ord(sign) < 0xE000 for sign in text):
        return
    assert bytes_of_tokens(text, tokenizer.pieces(tokenizer.encode(text, True))).sum() == len(text.encode())


@pytest.mark.parametrize("name", ["bf16", "SmolLM2-135M-Instruct.Q4_1.gguf"])
@pytest.mark.parametrize("sample", ["sample", "sample-code", "sample-multilingual"])
def test_real_tokenizers(name: str, sample: str, smollm2: Callable[[str], Path], tmp_path: Path) -> None:
    path = smollm2(name)
    tokenizer = backend("gguf" if path.is_file() else "hf").load_tokenizer(path, False)
    (text,) = load_text(DataSpec(dataset=sample), tmp_path, offline=True).documents
    text += "\n <|im_start|>🙂 \t\n"
    found = bytes_of_tokens(text, tokenizer.pieces(tokenizer.encode(text, True)))
    assert found.sum() == len(text.encode()) and (found > 0).all()


def test_both_tokenizers_of_a_model_count_alike(smollm2: Callable[[str], Path]) -> None:
    text = " Ωmega 日本語\n\n naïve 🙂  end"
    found = []
    for name in ("bf16", "SmolLM2-135M-Instruct.Q4_1.gguf"):
        path = smollm2(name)
        tokenizer = backend("gguf" if path.is_file() else "hf").load_tokenizer(path, False)
        found.append(bytes_of_tokens(text, tokenizer.pieces(tokenizer.encode(text, False))))
    assert np.array_equal(*found)


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """As Llama 2's: U+2581 for spaces, one put before the text, bytes for what the vocabulary lacks."""
    tokenizers = pytest.importorskip("tokenizers")
    from evalq.backends._token_pieces import pieces_of

    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "ï"]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary)}, "byte_fallback": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
    ]
    special = {"id": 1, "content": "<s>", "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
        "normalizer": normalizer, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders}, "model": model | {"merges": [["\u2581", "a"]]},
    }  # fmt: skip
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    text = "aï 日 a"
    ids = [1, *tokenizer.encode(text).ids]
    found = bytes_of_tokens(text, pieces_of(tokenizer, ids))
    assert found.tolist() == [0, 1, 2, 1, 1, 1, 1, 2], (
        "BOS, a, ï, space, three bytes of a character, space and a"
    )
