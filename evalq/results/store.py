"""Where results live: content-addressed, atomic, resumable.

    STORE/texts/                    WikiText-2 as fetched from the hub
    STORE/tokens/KEY.safetensors    a token stream and what its tokenizer said
    STORE/digests.json              SHA-256 of model files, by their stat
    STORE/models/KEY.json           what was found out about a model spec's files, for when they are gone
    STORE/families/FAMILY/KEY       results that differ in their windows only
    STORE/references/FAMILY/        what KL divergence against a reference needs of it (`evalq.results.kept`)
    STORE/speed/KEY.json            how fast a model is on a machine (`evalq.results.speed`)
    STORE/answers/KEY/              a model's own answers to prompts (`evalq.results.answers`)
    STORE/locks/KEY.lock            one writer at a time for each result
    STORE/results/KEY/              one (data, model) pair; KEY is the SHA-256 of its identity
        identity.json               what was scored, with what
        parts/                      the windows of one batch each, while a run is under way
        scores.safetensors          all of them, when it is done
        run.json                    how it was carried out
        record.json                 the sums, derived from the three above
        failure.json                why the last try ended, if it did
        worker.log                  what the engine printed

Every file is written under another name, synced and renamed, so a reader sees all of it or none, and a run
that is killed loses only the windows in flight. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from evalq.data.windows import WindowPlan
from evalq.errors import StoreError
from evalq.files import read_json, write_atomic, write_json, write_remedy
from evalq.results.kept import KeptReference
from evalq.results.speed import KeptSpeed
from evalq.results.tokens import (
    Array,
    Part,
    Timing,
    TokenColumns,
    encode,
    encode_part,
    read_columns,
    read_part,
    windows_in,
)

STORE_VERSION = 1
# What may differ between results that share windows.
_OF_THE_PLAN = ("windows", "tokens_scored", "plan_sha256", "mask_sha256")
SCORES, RUN, PARTS = "scores.safetensors", "run.json", "parts"


def default_root() -> Path:
    """$EVALQ_STORE, else the user's data folder."""
    from platformdirs import user_data_path

    return Path(os.environ.get("EVALQ_STORE") or user_data_path("evalq", appauthor=False))


def key_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of an identity's canonical JSON."""
    text = json.dumps({"store": STORE_VERSION, **identity}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def family_of(identity: Mapping[str, Any]) -> str:
    """Key of all results that differ from this one in their choice of windows only."""
    return key_of({name: value for name, value in identity.items() if name not in _OF_THE_PLAN})


@dataclass(frozen=True)
class Held:
    """What a result holds of a plan's windows.

    Args:
        plan: the windows.
        columns: name -> [n_targets]; values of windows that are not there mean nothing.
        there: name -> bool [W], which windows are there.
        timing: of all that is there.
    """

    plan: WindowPlan
    columns: Mapping[str, Array]
    there: Mapping[str, NDArray[np.bool_]]
    timing: Timing

    def missing(self, names: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """Window -> those of the named columns that it lacks; complete windows are left out."""
        nothing = np.zeros(len(self.plan.windows), bool)
        lacking: dict[int, tuple[str, ...]] = {}
        for name in names:
            for index in np.flatnonzero(~self.there.get(name, nothing)).tolist():
                lacking[index] = (*lacking.get(index, ()), name)
        return dict(sorted(lacking.items()))

    @property
    def complete(self) -> dict[str, Array]:
        """The columns that every window has."""
        return {name: column for name, column in self.columns.items() if self.there[name].all()}


class ResultDir:
    """One (data, model) pair in the store."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist yet."""
        self.path = path

    @contextmanager
    def lock(self, on_wait: Callable[[], None] = lambda: None, timeout: float = -1) -> Iterator[None]:
        """Hold the writer's lock, calling `on_wait` once if another process has it.

        It lies outside the result's folder, so that removing a result leaves it in place.

        Raises:
            StoreError: it cannot be made, or another process holds it for longer than `timeout` seconds.
        """
        file = self.path.parent.parent / "locks" / f"{self.path.name}.lock"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire(timeout=timeout)
        except Timeout:
            raise StoreError(f"another process is writing {self.path}", "wait for it") from None
        except OSError as error:
            message = f"cannot lock {self.path}: {error.strerror or error}"
            raise StoreError(message, write_remedy(error)) from None
        try:
            yield
        finally:
            lock.release()

    def write_part(self, part: Part, plan: WindowPlan) -> None:
        """Keep the columns of a batch. Raises StoreError."""
        names = hashlib.sha256("+".join(sorted(part.columns)).encode()).hexdigest()[:8]
        file = self.path / PARTS / f"{part.windows[0]:06d}-{names}.safetensors"
        write_atomic(file, encode_part(part, plan.digest))

    def held(self, plan: WindowPlan) -> Held:
        """What is there of a plan's windows, finished or in parts. What cannot be read is not there."""
        n_windows, n_targets = len(plan.windows), plan.n_targets
        columns: dict[str, Array] = {}
        there: dict[str, NDArray[np.bool_]] = {}
        timing = Timing()
        finished = self.every_target()
        if finished is not None and finished.belongs_to(plan):
            columns = {name: np.array(column) for name, column in finished.columns.items()}
            there = {name: np.ones(n_windows, bool) for name in columns}
            timing = finished.timing
        bounds = np.concatenate([[0], np.cumsum([window.n_targets for window in plan.windows])])
        for part in self._parts(plan):
            new = False
            for name, rows in part.columns.items():
                column = columns.setdefault(name, np.zeros(n_targets, rows.dtype))
                have = there.setdefault(name, np.zeros(n_windows, bool))
                if column.dtype != rows.dtype:
                    continue
                for index, row in zip(part.windows, rows, strict=True):
                    if not have[index]:
                        column[bounds[index] : bounds[index + 1]] = row
                        have[index], new = True, True
            timing = timing + part.timing if new else timing
        return Held(plan, columns, there, timing)

    def _parts(self, plan: WindowPlan) -> Iterator[Part]:
        for file in sorted((self.path / PARTS).glob("[0-9]*.safetensors")):
            part = read_part(file, plan)
            if part is not None:
                yield part

    def windows_done(self) -> int:
        """Windows that the parts of an unfinished run hold, by their readable headers."""
        done: set[int] = set()
        for file in (self.path / PARTS).glob("[0-9]*.safetensors"):
            done.update(windows_in(file))
        return len(done)

    def drop_parts(self) -> None:
        """Forget what an unfinished run has scored."""
        shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def finish(self, held: Held, run: Mapping[str, Any]) -> None:
        """Join what is held into scores.safetensors and note how the run was carried out.

        Raises:
            StoreError: it cannot be written.
        """
        assert held.complete, "a result has at least one complete column"
        plan = held.plan
        found = TokenColumns(held.complete, plan.window_of, held.timing, plan.table, plan.digest, plan.mask)
        write_json(self.path / RUN, run)
        write_atomic(self.path / SCORES, encode(found))
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        (self.path / "failure.json").unlink(missing_ok=True)

    def scores(self) -> TokenColumns | None:
        """The columns of a finished run, of the tokens that count; else None."""
        found = self.every_target()
        return None if found is None else found.counted

    def every_target(self) -> TokenColumns | None:
        """The columns of a finished run as they are kept, of all targets of its windows; else None."""
        return read_columns(self.path / SCORES)

    def run(self) -> dict[str, Any]:
        """How a finished run was carried out, {} when that cannot be read."""
        found = read_json(self.path / RUN)
        return found if isinstance(found, dict) else {}

    def answers(self, plan: WindowPlan, names: Iterable[str]) -> bool:
        """Whether every column asked for is there, or known to be more than the engine can give."""
        found = self.every_target()
        if found is None or not found.belongs_to(plan):
            return False
        known = self.run().get("columns_not_given")
        lacking = known if isinstance(known, list) else []
        return all(name in found.columns or name in lacking for name in names)

    def tidy(self) -> None:
        """Remove the parts that a kill left beside a finished result, unless somebody is writing."""
        if not (self.path / PARTS).is_dir():
            return
        with contextlib.suppress(StoreError), self.lock(timeout=0):
            if self.scores() is not None:
                shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def clear(self) -> None:
        """Remove this result, once no other process is writing it. Raises StoreError."""
        if not self.path.exists():
            return
        with self.lock():
            # Renamed first: whoever writes beside us makes a new folder instead of filling this one again.
            gone = self.path.parent.parent / f".removed-{uuid.uuid4().hex}"
            try:
                os.rename(self.path, gone)
            except FileNotFoundError:
                return
            except OSError as error:
                message = f"cannot remove {self.path}: {error.strerror or error}"
                raise StoreError(message, write_remedy(error)) from None
            shutil.rmtree(gone, ignore_errors=True)


class Store:
    """A folder of results."""

    def __init__(self, root: Path, read_only: bool = False) -> None:
        """Make the folder if need be, and try to write in it before any work is done for it.

        Args:
            root: the folder.
            read_only: only look at what is there: nothing is made, nothing is tried.

        Raises:
            StoreError: it cannot be written.
        """
        self.root = root
        if read_only:
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root) as file:
                file.write(b"evalq")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            remedy = write_remedy(error) if isinstance(error, OSError) else "name another folder with --store"
            raise StoreError(f"the store {root} cannot be written: {why}", remedy) from None

    def result(self, key: str) -> ResultDir:
        """The result with this key, there or not."""
        return ResultDir(self.root / "results" / key)

    def results(self) -> list[ResultDir]:
        """Every result that has an identity, oldest first."""
        found = []
        for file in (self.root / "results").glob("*/identity.json"):
            with contextlib.suppress(OSError):  # removed in the meantime
                found.append((file.stat().st_mtime, file.parent))
        return [ResultDir(path) for _, path in sorted(found)]

    @property
    def texts(self) -> Path:
        """Where texts fetched from the hub go."""
        return self.root / "texts"

    def tokens(self, key: str) -> Path:
        """Where a token stream is or goes."""
        return self.root / "tokens" / f"{key}.safetensors"

    @property
    def digests(self) -> Path:
        """The cache of model files' digests."""
        return self.root / "digests.json"

    def model(self, key: str) -> Path:
        """Where what is known of a model spec's files is or goes."""
        return self.root / "models" / f"{key}.json"

    def family(self, family: str) -> list[ResultDir]:
        """Results of one model on one token stream and protocol, whatever their windows."""
        try:
            return [self.result(file.name) for file in sorted((self.root / "families" / family).iterdir())]
        except OSError:
            return []

    def reference(self, family: str) -> KeptReference:
        """The rows of a reference, there or not."""
        return KeptReference(self.root / "references" / family)

    def speed(self, key: str, belongs_to: Mapping[str, Any]) -> KeptSpeed:
        """The figures of a model on a machine, there or not; `belongs_to` is what the key was made of."""
        return KeptSpeed(self.root / "speed" / f"{key}.json", belongs_to)

    def answers(self, key: str) -> Path:
        """Where a model's own answers are or go (`evalq.results.answers`)."""
        return self.root / "answers" / key

    def join_family(self, family: str, key: str) -> None:
        """Note that a result belongs to a family. Raises StoreError."""
        file = self.root / "families" / family / key
        if not file.exists():
            write_atomic(file, b"")
