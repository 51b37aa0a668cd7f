"""A model's own answers in the store, a file for each prompt, by the prompt's tokens.

    STORE/answers/KEY/identity.json    who answers, and how
    STORE/answers/KEY/PROMPT.json      the ids of one answer
    STORE/answers/KEY/chats-*.jsonl    prompts and answers as text, whose bytes bits per byte are of

KEY is the SHA-256 of the model's identity, the most new tokens and the tokens that end an answer. So a run
that was killed goes on with the next prompt, and more prompts take the answers that are there.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from evalq.data.tokens import TokenStream
from evalq.engine.backend import Ids
from evalq.files import read_json, write_json
from evalq.results.store import ResultDir


class KeptAnswers:
    """The answers of one model, with one limit."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist yet."""
        self.path = path

    def lock(self, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold the writer's lock, calling `on_wait` once if another process has it. Raises StoreError."""
        return ResultDir(self.path).lock(on_wait)

    def read(self, prompt: Ids) -> Ids | None:
        """The answer to a prompt, int64 [N]; None where none is kept, or it cannot be read."""
        found = read_json(self.file(prompt))
        ids = found.get("ids") if isinstance(found, dict) else None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            return None
        return np.asarray(ids, np.int64)

    def write(self, prompt: Ids, answer: Ids) -> None:
        """Keep an answer. Raises StoreError."""
        write_json(self.file(prompt), {"ids": [int(i) for i in answer]})

    def drop(self, prompt: Ids) -> None:
        """Forget an answer."""
        self.file(prompt).unlink(missing_ok=True)

    def file(self, prompt: Ids) -> Path:
        """Where the answer to a prompt is or goes."""
        name = hashlib.sha256(np.asarray(prompt).astype("<i8").tobytes()).hexdigest()[:32]
        return self.path / f"{name}.json"


def documents(stream: TokenStream) -> list[Ids]:
    """The documents of a stream, int64 [N] each."""
    ends = stream.facts.document_ends or (len(stream.ids_N),)
    return np.split(stream.ids_N, ends[:-1])
