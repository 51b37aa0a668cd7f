"""The bytes that tokens of a tokenizer.json write, from the strings of its vocabulary.

Two alphabets are in use. Byte-level vocabularies write every byte as a printable character (GPT-2's
bytes_to_unicode: https://github.com/openai/gpt-2/blob/master/src/encoder.py). Those of SentencePiece write
text, with U+2581 for a space and <0xE4> for a single byte.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from evalq.engine.backend import Piece
from evalq.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """What each id writes.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        ids: of its vocabulary.

    Raises:
        ModelError: its vocabulary is written in neither alphabet.
    """
    decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
    by_bytes = '"ByteLevel"' in decoder
    if (
        not by_bytes
        and _SPACE not in decoder
        and "\\u2581" not in decoder
        and '"ByteFallback"' not in decoder
    ):
        raise ModelError("this tokenizer does not tell the bytes of its tokens", "tokenizer_mismatch")
    added = tokenizer.get_added_tokens_decoder()
    known: dict[int, Piece] = {}
    for token in set(ids):
        if token in added:
            known[token] = Piece(added[token].content.encode(), added[token].special)
        else:
            text = tokenizer.id_to_token(token) or ""
            known[token] = Piece(_from_byte_level(text) if by_bytes else _from_sentencepiece(text))
    return [known[token] for token in ids]


def _from_byte_level(text: str) -> bytes:
    alphabet = _alphabet()
    return b"".join(alphabet.get(sign, sign.encode()) for sign in text)


def _from_sentencepiece(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


@cache
def _alphabet() -> dict[str, bytes]:
    """The printable character of each byte: its own where it has one, else the next above U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): bytes([byte]) for byte in printable}
    return found | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
