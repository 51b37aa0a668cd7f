"""Ids back to text, by the tokenizer of a scored model, in a process of its own.

The path of a model comes from a record, and a record may come from a stranger's store, so no code of a
checkpoint is run here, whatever its spec allowed when it was scored.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalq.engine.registry import backend, tokenizer_backend
from evalq.errors import EvalqError
from evalq.results.record import ResultRecord
from evalq.run.job import DecodeJob, DecodePiece
from evalq.run.prepare_model import tokenizer_files
from evalq.run.process import Event, WorkerSettings, run_worker
from evalq.spec.config import engine_python

# Loading a tokenizer takes seconds, transformers' import included.
_SECONDS = 120


@dataclass(frozen=True)
class Decoded:
    """The text of one piece.

    Args:
        before: what stands before.
        tokens: each of the piece's tokens, as it continues that.
    """

    before: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Decoding:
    """Pieces as text.

    Args:
        pieces: in the order that was given.
        why_ids: why they are ids in angle brackets; "" where they are text.
    """

    pieces: tuple[Decoded, ...]
    why_ids: str = ""


def decoded(pieces: Sequence[DecodePiece], records: Iterable[ResultRecord], offline: bool) -> Decoding:
    """Decode pieces by the first of the records whose tokenizer can be loaded; else show ids.

    Args:
        pieces: what to decode.
        records: of models that were scored on these ids, which all have the same tokenizer.
        offline: never use the network.
    """
    why = "no model's files are there any more"
    for record in records:
        path = None if record.model is None else Path(record.model.path)
        if path is None or not path.is_absolute() or not path.exists() or not tokenizer_files(path):
            continue
        try:
            found = _run(pieces, _backend(record, path), path, offline)
        except EvalqError as error:
            why = error.message
            continue
        if len(found) == len(pieces):
            return Decoding(found)
    return Decoding(tuple(map(_as_ids, pieces)), why)


def _backend(record: ResultRecord, path: Path) -> str:
    """The model's own engine where it has tokenizers, else by what its files are."""
    engine = str(record.identity.get("engine"))
    try:
        return engine if backend(engine).has_tokenizer else tokenizer_backend("auto", path)
    except EvalqError:  # a backend of another package, which is not installed here
        return tokenizer_backend("auto", path)


def _run(pieces: Sequence[DecodePiece], name: str, path: Path, offline: bool) -> tuple[Decoded, ...]:
    """Raises ModelError where the tokenizer cannot be loaded."""
    found: list[Decoded] = []

    def told(event: Event) -> None:
        if event["event"] == "decoded":
            found.append(Decoded(str(event["before"]), tuple(map(str, event["tokens"]))))

    with tempfile.TemporaryDirectory() as folder:
        worker = WorkerSettings(engine_python(name), _SECONDS, offline, Path(folder) / "decode.log")
        run_worker(DecodeJob(backend=name, path=str(path), pieces=tuple(pieces)), worker, told)
    return tuple(found)


def _as_ids(piece: DecodePiece) -> Decoded:
    return Decoded("".join(map(id_text, piece.before)), tuple(map(id_text, piece.tokens)))


def id_text(token: int) -> str:
    """What stands for a token whose text is not known."""
    return f"<{token}>"
