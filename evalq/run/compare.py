"""One data spec, many models: the whole way from specs to records.

A model that fails becomes a record with the reason, and the next one goes on. Only what is wrong with the
data spec, the command line or the store ends the run.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from evalq.data.sources import load_text
from evalq.engine.failures import remedy_of
from evalq.engine.registry import resolve_engine
from evalq.errors import ModelError, StoreError
from evalq.files import write_json
from evalq.results.floor import with_floors
from evalq.results.kept import NOT_KEPT, KeptReference, stored_names
from evalq.results.record import ResultRecord
from evalq.results.reference import Candidate, Reference, choose, with_reference
from evalq.results.store import ResultDir, Store, family_of, key_of
from evalq.run.beside import (
    Asked,
    asked_of_others,
    asked_of_reference,
    kept_reference,
    noisy_reference,
)
from evalq.run.checks import check_positions
from evalq.run.job import LoraJob, ScoreJob
from evalq.run.outcome import failed_record, remembered_record, scored_record
from evalq.run.predict import predict, require_fit
from evalq.run.prepare_data import PreparedData, choose_tokenizer, tokenized
from evalq.run.prepare_model import PreparedModel, Unprepared, prepare
from evalq.run.process import Event, RunSettings, WorkerSettings, run_worker
from evalq.run.reuse import reuse
from evalq.spec import DataSpec, ModelSpec, require_unique_labels

# Another process may remove a result (-cc) between its last window and its record.
_TRIES = 5


class Reporter(Protocol):
    """Who is told what happens while it happens."""

    def status(self, text: str) -> None:
        """Something that is no model's, such as tokenizing."""
        ...

    def model(self, label: str, windows: int) -> None:
        """A model's turn has come."""
        ...

    def event(self, event: Event) -> None:
        """What its worker said."""
        ...

    def record(self, record: ResultRecord, cached: bool) -> None:
        """Its result."""
        ...


def compare(
    data_spec: DataSpec, specs: Sequence[ModelSpec], store: Store, settings: RunSettings, reporter: Reporter
) -> list[ResultRecord]:
    """Score every model on the data, or fetch what the store already holds; failures are records too.

    Raises:
        SpecError, DataError, StoreError: nothing more can be scored; what was scored is in the store.
        KeyboardInterrupt: after the running worker was ended.
    """
    require_unique_labels(list(specs))
    for spec in specs:
        with contextlib.suppress(ModelError):  # of that model alone; prepare() makes a record of it
            resolve_engine(spec)  # a typo in the last model must not be found after a night of scoring
    text = load_text(data_spec, store.texts, settings.offline)
    models = [prepare(spec, store, settings.offline) for spec in specs]
    reference = choose([_candidate(model) for model in models], settings.reference)
    if settings.noise_floor:
        models += noisy_reference(models, reference, store, settings, reporter.status)
    chosen = choose_tokenizer(data_spec, models, store, settings.offline)
    data = tokenized(data_spec, text, chosen, store, settings, reporter.status)
    first = None if reference is None else reference.label
    records: dict[str, ResultRecord] = {}
    of_first, asked = asked_of_reference(settings), asked_of_others(settings, None)
    for model in sorted(models, key=lambda model: model.spec.plain_label != first):
        label = model.spec.plain_label
        reporter.model(label, len(data.plan.windows))
        record, cached = _score(model, data, store, settings, of_first if label == first else asked, reporter)
        reporter.record(record, cached)
        records[record.label] = record
        if label == first and settings.kld:
            asked = asked_of_others(settings, kept_reference(record, data, store, reporter.status))
    in_order = [records[model.spec.plain_label] for model in models]
    return _compared(in_order, models, reference, store, reporter)


def _candidate(model: PreparedModel | Unprepared) -> Candidate:
    marked = 2 if model.spec.reference else int(model.spec.out_logits is not None)
    label = model.spec.plain_label
    if isinstance(model, Unprepared):
        return Candidate(label, None, marked=marked)
    bpw = model.spec.override_bpw_layer or model.storage.layer_bpw
    return Candidate(label, bpw, model.derived, marked)


def _compared(
    records: list[ResultRecord],
    models: list[PreparedModel | Unprepared],
    reference: Reference | None,
    store: Store,
    reporter: Reporter,
) -> list[ResultRecord]:
    """Every record beside the reference; the next by rule where one that the rule chose has failed."""
    scored = [record for record in records if record.status == "ok"]
    if reference is None or all(record.label != reference.label for record in scored):
        if reference is not None and scored:
            what = f'the reference "{reference.label}" was not scored'
            reporter.status(what if reference.by_hand else f"{what}: another one takes its place")
        if reference is None or not reference.by_hand:
            by_label = {model.spec.plain_label: model for model in models}
            left = [
                Candidate(r.label, r.layer_bpw, getattr(by_label[r.label], "derived", False)) for r in scored
            ]
            reference = choose(left)
    found = with_floors(
        with_reference(records, reference, lambda record: store.result(str(record.key)).scores())
    )
    for record in found:
        if record.status == "ok" and record.key is not None:
            with contextlib.suppress(StoreError):
                write_json(store.result(record.key).path / "record.json", record.model_dump())
    return found


def _score(
    model: PreparedModel | Unprepared,
    data: PreparedData,
    store: Store,
    settings: RunSettings,
    asked: Asked,
    reporter: Reporter,
) -> tuple[ResultRecord, bool]:
    if isinstance(model, Unprepared):
        return _recalled(model, data, store)
    identity = {**data.comparison, **model.identity}
    result = store.result(key_of(identity))
    keep = store.reference(family_of(identity)) if asked.keep else None
    if settings.clear_cache:
        result.clear()
        if keep is not None:
            keep.drop(data.plan.windows)
    else:
        legacy = {k: v for k, v in data.comparison.items() if k != "plan_sha256"} | model.legacy_identity
        reuse(store, result, data.plan, identity, legacy)
    kept = {"label": model.spec.plain_label, **identity}
    try:
        for attempt in range(_TRIES):
            settled = _rows_settled(keep, data, result, settings, attempt)
            if settled and result.answers(data.plan, stored_names(asked.columns, asked.kept)):
                result.tidy()
                record = scored_record(model, data, identity, result)
                if record is not None:
                    write_json(result.path / "identity.json", kept)
                    store.join_family(family_of(identity), result.path.name)
                    return record, attempt == 0
            check_positions(model.checkpoint.max_positions, data.plan)
            write_json(result.path / "identity.json", kept)
            _predict(model, data, settings, result)
            worker = WorkerSettings(
                model.python, settings.timeout_seconds, settings.offline, result.path / "worker.log"
            )
            job = _job(model, data, asked, result, kept, keep, settings.reference_most_bytes)
            _run_scoring(job, worker, reporter)
        raise StoreError(f"{result.path} is removed again and again", "use another --store for this run")
    except ModelError as error:
        failure = {"category": error.category, "message": error.message, "remedy": remedy_of(error)}
        write_json(result.path / "failure.json", failure)
        return failed_record(model.spec, model, data, error, result.path.name), False


def _rows_settled(
    keep: KeptReference | None, data: PreparedData, result: ResultDir, settings: RunSettings, attempt: int
) -> bool:
    """Whether the rows asked for are there, or it is known that they cannot be kept."""
    if keep is None or attempt > 0 or keep.there(data.plan).all():
        return True
    return bool(result.run().get(NOT_KEPT, -1) == settings.reference_most_bytes)


def _recalled(model: Unprepared, data: PreparedData, store: Store) -> tuple[ResultRecord, bool]:
    """A stored result of a model whose files are gone, else its failure."""
    if model.remembered is not None:
        key = key_of({**data.comparison, **model.remembered})
        record = remembered_record(model, data, key, store.result(key))
        if record is not None:
            return record, True
    return failed_record(model.spec, None, data, model.error, None), False


def _predict(model: PreparedModel, data: PreparedData, settings: RunSettings, result: ResultDir) -> None:
    """Raise ModelError for a model that cannot fit; keep what is predicted."""
    prediction = predict(model, data.plan)
    if not settings.try_anyway:
        require_fit(prediction)
    if prediction is not None:
        write_json(result.path / "predicted.json", asdict(prediction))


def _run_scoring(job: ScoreJob, worker: WorkerSettings, reporter: Reporter) -> None:
    """Run a worker to its end; once more with half as much at once if it runs out of memory while scoring."""
    try:
        run_worker(job, worker, reporter.event)
    except ModelError as error:
        if error.category != "oom_forward":
            raise
        reporter.status(f"out of memory ({error.message}): once more with half as much at once")
        run_worker(job.model_copy(update={"divide_work": 2}), worker, reporter.event)


def _job(
    model: PreparedModel,
    data: PreparedData,
    asked: Asked,
    result: ResultDir,
    identity: dict[str, Any],
    keep: KeptReference | None,
    keep_most_bytes: int | None,
) -> ScoreJob:
    """`keep` is where the model's rows go, of at most `keep_most_bytes`; None where nobody asks for them."""
    lora = model.adapter
    return ScoreJob(
        load=model.engine.load,
        forward=model.engine.forward,
        load_fn=model.spec.load_fn,
        path=str(model.files.path),
        overlay=None if model.files.overlay is None else str(model.files.overlay),
        options=model.engine.options,
        trust_remote_code=model.spec.trust_remote_code,
        versions=model.versions if model.remote else {},
        tokens_file=str(data.tokens_file.resolve()),
        max_tokens=data.spec.max_tokens,
        settings=data.settings,
        plan_digest=data.plan.digest,
        columns=asked.columns,
        reference=None if asked.kept is None else str(asked.kept.path.resolve()),
        keep_reference=None if keep is None else str(keep.path.resolve()),
        keep_most_bytes=keep_most_bytes,
        result_dir=str(result.path.resolve()),
        identity=identity,
        lora=None if lora is None else LoraJob(path=str(lora.path), name=lora.name),
    )
