"""Where results live: content-addressed, atomic, resumable.

    STORE/texts/                    WikiText-2 as fetched from the hub
    STORE/tokens/KEY.safetensors    a token stream and what its tokenizer said
    STORE/digests.json              SHA-256 of model files, by their stat
    STORE/results/KEY/              one (data, model) pair; KEY is the SHA-256 of its identity
        identity.json               what was scored, with what
        parts/00012.safetensors     the windows of one forward() each, while a run is under way
        scores.safetensors          all of them, when it is done
        run.json                    how it was carried out
        record.json                 the sums, derived from the three above
        failure.json                why the last try ended, if it did
        worker.log                  what the engine printed
        lock                        one writer at a time

Every file is written under another name, synced and renamed, so a reader sees all of it or none, and a run
that is killed loses only the windows in flight. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from evalq.errors import StoreError
from evalq.files import write_atomic, write_json, write_remedy

STORE_VERSION = 1


def default_root() -> Path:
    """$EVALQ_STORE, else the user's data folder."""
    from platformdirs import user_data_path

    return Path(os.environ.get("EVALQ_STORE") or user_data_path("evalq", appauthor=False))


def key_of(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of an identity's canonical JSON."""
    text = json.dumps({"store": STORE_VERSION, **identity}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StoredScores:
    """Per-token scores of a run, in window order.

    Args:
        logprob: nats, float32 [n].
        top1: bool [n].
        window: index of the window each token was scored in, int64 [n].
        seconds: time spent in forward(), summed over every session of the run.
    """

    logprob: NDArray[np.float32]
    top1: NDArray[np.bool_]
    window: NDArray[np.int64]
    seconds: float


class ResultDir:
    """One (data, model) pair in the store."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist yet."""
        self.path = path

    @contextmanager
    def lock(self, on_wait: Callable[[], None] = lambda: None, timeout: float = -1) -> Iterator[None]:
        """Hold the writer's lock, calling `on_wait` once if another process has it. Raises StoreError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire(timeout=timeout)
        except OSError as error:
            raise StoreError(
                f"cannot lock {self.path}: {error.strerror or error}", write_remedy(error)
            ) from None
        try:
            yield
        finally:
            lock.release()

    def write_part(
        self, windows: list[int], logprob_BK: NDArray[np.float32], top1_BK: NDArray[np.bool_], seconds: float
    ) -> None:
        """Keep the scores of the windows of one forward(). Raises StoreError."""
        tensors: dict[str, NDArray[Any]] = {
            "window": np.asarray(windows, np.int64),
            "logprob": np.ascontiguousarray(logprob_BK, np.float32),
            "top1": np.ascontiguousarray(top1_BK).astype(np.uint8),
        }
        data = save(tensors, {"seconds": repr(seconds)})
        write_atomic(self.path / "parts" / f"{windows[0]:06d}.safetensors", data)

    def parts(self) -> StoredScores:
        """Every part so far; a part that cannot be read counts as not there."""
        logprob, top1, window, seconds = [], [], [], 0.0
        for file in sorted((self.path / "parts").glob("*.safetensors")):
            try:
                part = load_file(file)
                seconds += float(_metadata(file)["seconds"])
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
            logprob.append(part["logprob"].ravel())
            top1.append(part["top1"].ravel().astype(bool))
            window.append(np.repeat(part["window"], part["logprob"].shape[1]))
        if not window:
            return StoredScores(np.empty(0, np.float32), np.empty(0, bool), np.empty(0, np.int64), 0.0)
        order = np.argsort(np.concatenate(window), kind="stable")
        return StoredScores(
            np.concatenate(logprob)[order],
            np.concatenate(top1)[order],
            np.concatenate(window)[order],
            seconds,
        )

    def finish(self, run: dict[str, Any]) -> None:
        """Join the parts into scores.safetensors and note how the run was carried out. Raises StoreError."""
        scores = self.parts()
        tensors: dict[str, NDArray[Any]] = {
            "logprob": scores.logprob,
            "top1": scores.top1.astype(np.uint8),
            "window": scores.window,
        }
        write_json(self.path / "run.json", run)
        write_atomic(self.path / "scores.safetensors", save(tensors, {"seconds": repr(scores.seconds)}))
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        (self.path / "failure.json").unlink(missing_ok=True)

    def scores(self) -> StoredScores | None:
        """The scores of a finished run, else None."""
        file = self.path / "scores.safetensors"
        try:
            found = load_file(file)
            seconds = float(_metadata(file)["seconds"])
            return StoredScores(found["logprob"], found["top1"].astype(bool), found["window"], seconds)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def clear(self) -> None:
        """Remove this result, once no other process is writing it. Raises StoreError."""
        if not self.path.exists():
            return
        with self.lock():
            try:
                shutil.rmtree(self.path)
            except OSError as error:
                raise StoreError(f"cannot remove {self.path}: {error.strerror or error}") from None


class Store:
    """A folder of results. Raises StoreError when it cannot be written."""

    def __init__(self, root: Path) -> None:
        """Make the folder if need be, and try to write in it before any work is done for it."""
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root) as file:
                file.write(b"evalq")
        except OSError as error:
            raise StoreError(
                f"the store {root} cannot be written: {error.strerror or error}", write_remedy(error)
            ) from None

    def result(self, key: str) -> ResultDir:
        """The result with this key, there or not."""
        return ResultDir(self.root / "results" / key)

    def results(self) -> list[ResultDir]:
        """Every result that has an identity, oldest first."""
        found = (self.root / "results").glob("*/identity.json")
        return [ResultDir(file.parent) for file in sorted(found, key=lambda file: file.stat().st_mtime)]

    @property
    def texts(self) -> Path:
        """Where texts fetched from the hub go."""
        return self.root / "texts"

    def tokens(self, key: str) -> Path:
        """Where a token stream is or goes."""
        return self.root / "tokens" / f"{key}.safetensors"


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata() or {})
