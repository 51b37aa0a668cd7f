"""A worker's jobs with a tokenizer: text -> token stream, and ids -> text."""

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.data import chat
from evalq.data.token_bytes import bytes_of_tokens
from evalq.data.tokens import PROBE_CHARACTERS, PROBE_EXTRA, write_stream
from evalq.data.windows import StreamFacts
from evalq.engine.backend import Tokenizer
from evalq.engine.registry import backend
from evalq.errors import DataError, ModelError
from evalq.run.chat import tokenized_chat, tokenized_prompt
from evalq.run.job import DecodeJob, TokenizeJob
from evalq.spec.base import shown

# A chat template is a program of the checkpoint. An honest one takes milliseconds.
TEMPLATE_SECONDS = 10
# As much of a text as decides how the next token is written after it.
_TAIL_TOKENS = 8


def tokenize(job: TokenizeJob, emit: Callable[..., None]) -> None:
    """Tokenize a text with a backend's tokenizer and keep the stream.

    Raises:
        ModelError: there is no such tokenizer, or its chat template does not end or cannot be rendered.
        StoreError: the stream cannot be kept.
    """
    tokenizer = backend(job.backend).load_tokenizer(Path(job.path), job.trust_remote_code)
    emit("loaded")
    if job.chat:
        _tokenize_chat(job, tokenizer)
        return
    ids: list[int] = []
    ends: list[int] = []
    for document in job.documents:
        ids += tokenizer.encode(document, job.add_special)
        ends.append(len(ids))
    bytes_N, bytes_unknown = _bytes_of(tokenizer, job.documents, ids, ends)
    prefix: list[int] = []
    if job.chat_template:
        emit("rendering", seconds=TEMPLATE_SECONDS)
        with _time_limit(TEMPLATE_SECONDS, 'set "chat_template" to false in the data spec'):
            prefix = tokenizer.chat_prefix()
    described = _described(tokenizer, ids, ends, job.documents[0])
    described |= {"prefix_ids": prefix, "bytes_unknown": bytes_unknown}
    write_stream(Path(job.out), np.asarray(ids, np.int64), described, bytes_N=bytes_N)


def _tokenize_chat(job: TokenizeJob, tokenizer: Tokenizer) -> None:
    """Conversations with a mask of what the assistant says, or prompts with what ends an answer to them."""
    ids: list[int] = []
    ends: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    stop_ids = set(tokenizer.stop_ids)
    chats = [chat.from_document(document) for document in job.documents]
    for number, messages in enumerate(chats, 1):
        with _template_of(number):
            if job.chat == "prompts":
                rendered = tokenized_prompt(tokenizer, messages)
                stop_ids |= rendered.ends_with
            else:
                rendered = tokenized_chat(tokenizer, messages)
        ids += rendered.ids
        masks.append(rendered.mask)
        ends.append(len(ids))
    described = _described(tokenizer, ids, ends, chat.said(chats[0], None))
    described |= {"prefix_ids": [], "stop_ids": sorted(stop_ids)}
    mask_N = None if job.chat == "prompts" else np.concatenate(masks)
    write_stream(Path(job.out), np.asarray(ids, np.int64), described, mask_N)


@contextlib.contextmanager
def _template_of(number: int) -> Iterator[None]:
    """What goes wrong in a conversation, told with its number. A template may raise anything."""
    try:
        with _time_limit(TEMPLATE_SECONDS, "take another model's template: set tokenizer_dir"):
            yield
    except ModelError as error:
        what = f"conversation {number}: {error.message}"
        raise ModelError(what, error.category, error.remedy) from None
    except Exception as error:
        why = shown(str(error).strip() or type(error).__name__, 200)
        message = f"conversation {number}: the chat template cannot be rendered: {why}"
        remedy = "change the conversation, or set tokenizer_dir to a model with another template"
        raise ModelError(message, "tokenizer_mismatch", remedy) from None


def _described(tokenizer: Tokenizer, ids: list[int], ends: list[int], text: str) -> dict[str, Any]:
    """What stands beside the ids in a stream's file."""
    probe_text = text[:PROBE_CHARACTERS] + PROBE_EXTRA
    return {
        "facts": asdict(_facts(tokenizer, ids, ends)),
        "probe_text": probe_text,
        "probe_ids": tokenizer.encode(probe_text, False),
    }


def decode(job: DecodeJob, emit: Callable[..., None]) -> None:
    """Tell the text of each piece: what stands before, and every token as it continues that.

    Raises:
        ModelError: there is no such tokenizer.
    """
    tokenizer = backend(job.backend).load_tokenizer(Path(job.path))
    emit("loaded")
    for piece in job.pieces:
        before = tokenizer.decode(list(piece.before))
        tail = list(piece.before[-_TAIL_TOKENS:])
        emit("decoded", before=before, tokens=[_continued(tokenizer, tail, token) for token in piece.tokens])


def _continued(tokenizer: Tokenizer, tail: list[int], token: int) -> str:
    """A token's own text after others: many tokenizers drop the space before the first one."""
    if not 0 <= token < tokenizer.vocab_size:
        return f"<{token}>"
    shorter, longer = tokenizer.decode(tail), tokenizer.decode([*tail, token])
    if longer.startswith(shorter) and len(longer) > len(shorter):
        return longer[len(shorter) :]
    return tokenizer.decode([token])  # it ends a character that the others began


def _bytes_of(
    tokenizer: Tokenizer, documents: Sequence[str], ids: list[int], ends: list[int]
) -> tuple[NDArray[np.int64] | None, str | None]:
    """Bytes of the text that each token stands for, int64 [N], or why they cannot be told."""
    try:
        pieces = tokenizer.pieces(ids)
        parts = [
            bytes_of_tokens(document, pieces[start:end])
            for document, (start, end) in zip(documents, pairwise([0, *ends]), strict=True)
        ]
        return np.concatenate(parts), None
    except (ModelError, DataError) as error:
        return None, str(error)


def _facts(tokenizer: Tokenizer, ids: list[int], ends: list[int]) -> StreamFacts:
    return StreamFacts(
        n_tokens=len(ids),
        document_ends=tuple(ends) if len(ends) > 1 else (),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        adds_bos=tokenizer.adds_bos,
    )


@contextlib.contextmanager
def _time_limit(seconds: int, remedy: str) -> Iterator[None]:
    """Raise ModelError in what takes longer; where Python cannot be interrupted, end the process.

    The second limit is a thread of faulthandler's, in C: it needs no lock of Python's.
    """

    def expired(number: int, frame: FrameType | None) -> None:
        raise _Expired

    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Expired:
        message = f"the chat template took longer than {seconds} s"
        raise ModelError(message, "timeout", remedy) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


class _Expired(BaseException):
    """Not an Exception: whoever tries several templates would catch it and go on."""
