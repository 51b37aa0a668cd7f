"""One model's turn: every text that it is scored on, by one worker that loads it once.

Each text has a result of its own, which runs of other texts share. A text that cannot be scored becomes a
failed record, and the others are scored all the same: by the same worker where it knew that before it began
the text, else by a new one, once.
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from evalq.engine.failures import remedy_of
from evalq.errors import ModelError, StoreError
from evalq.files import write_json
from evalq.results.kept import NOT_KEPT, KeptReference, stored_names
from evalq.results.record import ResultRecord
from evalq.results.store import ResultDir, Store, family_of, key_of
from evalq.run.beside import Asked
from evalq.run.cache_check import check_stored
from evalq.run.checks import check_positions
from evalq.run.job import ScoreJob, TextJob
from evalq.run.outcome import failed_record, remembered_record, scored_record
from evalq.run.predict import predict, require_fit
from evalq.run.prepare_data import PreparedData
from evalq.run.prepare_model import PreparedModel, Unprepared
from evalq.run.process import Event, RunSettings, WorkerSettings, run_worker
from evalq.run.reuse import reuse
from evalq.run.steps import step_tokens

# Another process may remove a result (-cc) between its last window and its record.
_TRIES = 5
_ENDED = "the engine failed while scoring other texts, so this one was not tried"


class Listener(Protocol):
    """Who is told what happens while a model has its turn."""

    def status(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def event(self, event: Event) -> None:
        """What a worker said."""
        ...


@dataclass(frozen=True)
class TextAsked:
    """One text of a model's turn.

    Args:
        name: what it is called in this run.
        data: it, with its windows.
        asked: what the model has to say of it.
    """

    name: str
    data: PreparedData
    asked: Asked


@dataclass(frozen=True)
class Outcome:
    """What came of one text.

    Args:
        record: scored or failed.
        cached: nothing had to be scored for it.
    """

    record: ResultRecord
    cached: bool


def take_turn(
    model: PreparedModel | Unprepared,
    texts: Sequence[TextAsked],
    store: Store,
    settings: RunSettings,
    listener: Listener,
) -> list[Outcome]:
    """Score a model on every text, or fetch what the store holds; an outcome for each, in their order.

    Raises:
        StoreError: the store is at fault.
        DataError: a text is.
    """
    if isinstance(model, Unprepared):
        return [_recalled(model, text.data, store) for text in texts]
    turn = [_Text.of(model, text, store, settings) for text in texts]
    found: dict[str, Outcome] = {}
    for text in turn:
        text.make_ready(store, settings)
    for attempt in range(_TRIES):
        for text in turn:
            outcome = None if text.name in found else text.finished(store, settings, attempt)
            if outcome is not None:
                found[text.name] = outcome
        able = []
        for text in turn:
            if text.name not in found:
                refused = text.refused(settings)
                if refused is None:
                    able.append(text)
                else:
                    found[text.name] = text.failed(refused)
        if not able:
            return [found[text.name] for text in texts]
        failures = _score(model, able, settings, listener)
        found |= {text.name: text.failed(failures[text.name]) for text in able if text.name in failures}
    gone = next(text.result.path for text in turn if text.name not in found)
    raise StoreError(f"{gone} is removed again and again", "use another --store for this run")


@dataclass(frozen=True)
class _Text:
    """A model on one text.

    Args:
        name: of the text.
        model: as prepared.
        data: the text.
        asked: of the model.
        identity: of the result.
        result: where it is or goes.
        keep: where the model's rows go, None where nobody asks for them.
    """

    name: str
    model: PreparedModel
    data: PreparedData
    asked: Asked
    identity: Mapping[str, Any]
    result: ResultDir
    keep: KeptReference | None

    @classmethod
    def of(cls, model: PreparedModel, text: TextAsked, store: Store, settings: RunSettings) -> "_Text":
        """The model's result on a text, there or not."""
        identity = {**text.data.comparison, **model.identity}
        keep = store.reference(family_of(identity)) if text.asked.keep else None
        result = store.result(key_of(identity))
        return cls(text.name, model, text.data, text.asked, identity, result, keep)

    def make_ready(self, store: Store, settings: RunSettings) -> None:
        """Forget what is to be scored anew, else take what other results hold. Raises StoreError."""
        if settings.clear_cache:
            self.result.clear()
            if self.keep is not None:
                self.keep.drop(self.data.plan.windows)
            return
        shared = {k: v for k, v in self.data.comparison.items() if k != "plan_sha256"}
        reuse(store, self.result, self.data.plan, self.identity, shared | self.model.legacy_identity)

    def finished(self, store: Store, settings: RunSettings, attempt: int) -> Outcome | None:
        """The outcome where nothing is left to score; None where something is."""
        names = stored_names(self.asked.columns, self.asked.kept)
        if not (self._rows_settled(settings, attempt) and self.result.answers(self.data.plan, names)):
            return None
        self.result.tidy()
        try:
            check_stored(store, self.identity, self.result)
            record = scored_record(self.model, self.data, dict(self.identity), self.result)
        except ModelError as error:
            return self.failed(error)
        if record is None:
            return None
        write_json(self.result.path / "identity.json", self.labelled_identity)
        store.join_family(family_of(self.identity), self.result.path.name)
        return Outcome(record, attempt == 0)

    def _rows_settled(self, settings: RunSettings, attempt: int) -> bool:
        """Whether the rows asked for are there, or it is known that they cannot be kept."""
        if self.keep is None or attempt > 0 or self.keep.there(self.data.plan).all():
            return True
        return bool(self.result.run().get(NOT_KEPT, -1) == settings.reference_most_bytes)

    def refused(self, settings: RunSettings) -> ModelError | None:
        """Why no engine need be started for it, None where one must; what is predicted is kept."""
        try:
            check_positions(self.model.checkpoint.max_positions, self.data.plan)
            write_json(self.result.path / "identity.json", self.labelled_identity)
            prediction = predict(self.model, self.data.plan)
            if not settings.try_anyway:
                require_fit(prediction)
        except ModelError as error:
            return error
        if prediction is not None:
            write_json(self.result.path / "predicted.json", asdict(prediction))
        return None

    def failed(self, error: ModelError) -> Outcome:
        """The outcome of a failure, which is noted beside the result too."""
        failure = {"category": error.category, "message": error.message, "remedy": remedy_of(error)}
        write_json(self.result.path / "failure.json", failure)
        name = self.result.path.name
        return Outcome(failed_record(self.model.spec, self.model, self.data, error, name), False)

    @property
    def labelled_identity(self) -> dict[str, Any]:
        """What is kept beside the result."""
        return {"label": self.model.spec.plain_label, **self.identity}

    @property
    def job(self) -> TextJob:
        """The text's part of the message to a worker."""
        kept = self.asked.kept
        return TextJob(
            name=self.name,
            tokens_file=str(self.data.tokens_file.resolve()),
            max_tokens=self.data.spec.max_tokens,
            settings=self.data.settings,
            plan_digest=self.data.plan.digest,
            columns=self.asked.columns,
            result_dir=str(self.result.path.resolve()),
            identity=self.labelled_identity,
            keep_reference=None if self.keep is None else str(self.keep.path.resolve()),
            reference=None if kept is None else str(kept.path.resolve()),
        )


def _recalled(model: Unprepared, data: PreparedData, store: Store) -> Outcome:
    """A stored result of a model whose files are gone, else its failure."""
    if model.remembered is not None:
        key = key_of({**data.comparison, **model.remembered})
        record = remembered_record(model, data, key, store.result(key))
        if record is not None:
            return Outcome(record, True)
    return Outcome(failed_record(model.spec, None, data, model.error, None), False)


def _score(
    model: PreparedModel, texts: Sequence[_Text], settings: RunSettings, listener: Listener
) -> dict[str, ModelError]:
    """Score texts; why some could not be, by name."""
    failures: dict[str, ModelError] = {}
    for group in _groups(texts):
        job = _job(model, [text.job for text in group], settings)
        log = group[0].result.path / "worker.log"
        worker = WorkerSettings(model.python, settings.timeout_seconds, settings.offline, log)
        failures |= _run_workers(job, worker, listener)
    return failures


def _groups(texts: Sequence[_Text]) -> list[list[_Text]]:
    """Texts that one worker can score as they would be scored alone; nearly always all of them.

    A worker is given one head of the reference, which is the same on every text unless the reference's files
    changed after it was scored on one of them. And it takes windows in steps of one size: a protocol without
    steps goes apart from one with them where its own windows are longer than that.
    """
    heads = {text.name: _head_of(text) for text in texts}
    first = next((head for head in heads.values() if head is not None), None)
    options = texts[0].model.engine.options
    together = step_tokens(options, [text.data.plan for text in texts])

    def in_one_pass(text: _Text) -> bool:
        inputs = text.data.plan.longest_tokens - 1
        return (
            together is not None and inputs > together and step_tokens(options, [text.data.plan]) != together
        )

    groups: dict[tuple[str | None, bool], list[_Text]] = {}
    for text in texts:
        groups.setdefault((heads[text.name] or first, in_one_pass(text)), []).append(text)
    return list(groups.values())


def _head_of(text: _Text) -> str | None:
    """Digest of the head of the reference that it is compared with; None without."""
    head = None if text.asked.kept is None else text.asked.kept.head()
    return None if head is None else head.digest


def _job(model: PreparedModel, texts: Sequence[TextJob], settings: RunSettings) -> ScoreJob:
    return ScoreJob(
        **model.for_job,
        versions=model.versions if model.remote else {},
        texts=tuple(texts),
        keep_most_bytes=settings.reference_most_bytes,
    )


class _Heard:
    """What a worker has said of its texts, passed on to the listener."""

    def __init__(self, listener: Listener) -> None:
        self.at: str | None = None  # the text that was begun last
        self.done: set[str] = set()
        self.failures: dict[str, ModelError] = {}
        self._listener = listener

    def __call__(self, event: Event) -> None:
        kind, name = event["event"], str(event.get("name"))
        if kind == "text":
            self.at = name
        elif kind == "text_done":
            self.done.add(name)
        elif kind == "text_failed":
            self.failures[name] = ModelError(event["message"], event["category"], event["remedy"])
        self._listener.event(event)


def _run_workers(job: ScoreJob, worker: WorkerSettings, listener: Listener) -> dict[str, ModelError]:
    """Run a job to its end; why texts of it could not be scored, by name.

    Out of memory while scoring, a worker is run once more with half as much at once. Where one ends in the
    middle of a text otherwise, the texts after it get a new one, once. A failure to load is every text's.
    """
    failures: dict[str, ModelError] = {}
    first_failure = True
    while True:
        heard = _Heard(listener)
        try:
            run_worker(job, worker, heard)
            return failures | heard.failures
        except ModelError as error:
            failures |= heard.failures
            left = [text for text in job.texts if text.name not in heard.done | failures.keys()]
            if error.category == "oom_forward" and job.divide_work == 1:
                listener.status(f"out of memory ({error.message}): once more with half as much at once")
                job = job.model_copy(update={"texts": tuple(left), "divide_work": 2})
                continue
            if heard.at is None or error.category == "timeout":
                return failures | {text.name: error for text in left}
            if heard.at not in heard.done:  # else it ended between two texts
                failures[heard.at] = error
                left = [text for text in left if text.name != heard.at]
                _keep_log(worker.log, job, heard.at)
            if not left or not first_failure:
                return failures | {text.name: _not_tried(error) for text in left}
            first_failure = False
            listener.status(f"{heard.at}: {error.message}; a new worker goes on with the other texts")
            job = job.model_copy(update={"texts": tuple(left)})
            worker = replace(worker, log=Path(left[0].result_dir) / worker.log.name)


def _not_tried(error: ModelError) -> ModelError:
    return ModelError(f"{_ENDED}: {error.message}", error.category, error.remedy)


def _keep_log(log: Path, job: ScoreJob, name: str) -> None:
    """Leave what the engine printed beside the text that failed."""
    folder = next(Path(text.result_dir) for text in job.texts if text.name == name)
    with contextlib.suppress(OSError):  # it lies there already, or there is none
        shutil.copyfile(log, folder / log.name)
