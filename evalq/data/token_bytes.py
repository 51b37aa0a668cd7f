"""How many bytes of the text each token of a stream stands for.

The pieces that a tokenizer's tokens write are laid along the text, so the numbers are exact where they can be
told at all: a tokenizer that changes the text before it cuts it (Unicode normalization, lower case) writes
other bytes, and then none are told.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evalq.engine.backend import Piece
from evalq.errors import DataError

_SHOWN_BYTES = 20


def bytes_of_tokens(document: str, pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """UTF-8 bytes of the document that each of its tokens stands for; together all of them.

    A special token that the text does not hold (BOS) stands for none, and neither does the space that some
    tokenizers put before a text.

    Args:
        document: as it was tokenized.
        pieces: what each token writes, [n].

    Returns:
        int64 [n].

    Raises:
        DataError: the pieces do not make up the document.
    """
    text = document.encode()
    found = np.zeros(len(pieces), np.int64)
    at = 0
    plain = b"".join(piece.text for piece in pieces if not piece.special)
    before = plain == b" " + text
    for i, piece in enumerate(pieces):
        written = piece.text
        if before and not piece.special:
            written, before = written[1:], False
        if not text.startswith(written, at):
            if piece.special:
                continue
            if at > 0 or written[:1] != b" " or not text.startswith(written[1:]):
                raise _changed(text, at, written)
            written = written[1:]
        found[i] = len(written)
        at += len(written)
    if at != len(text):
        raise _changed(text, at, b"")
    return found


def _changed(text: bytes, at: int, written: bytes) -> DataError:
    was, now = text[at : at + _SHOWN_BYTES], written[:_SHOWN_BYTES]
    return DataError(
        f"the tokenizer changes the text before it cuts it: {was!r} at byte {at} became {now!r}",
        "take a text that it leaves alone (NFC-normalized Unicode for most), or another tokenizer",
    )
