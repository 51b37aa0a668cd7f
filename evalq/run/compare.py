"""One data spec, many models: the whole way from specs to records.

A model that fails becomes a record with the reason, and the next one goes on. Only what is wrong with the
data spec, the command line or the store ends the run.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from evalq.data.sources import load_text
from evalq.errors import ModelError
from evalq.failures import remedy_of
from evalq.files import write_json
from evalq.machine import environment
from evalq.registry import resolve_engine
from evalq.results.record import ResultRecord
from evalq.results.store import ResultDir, Store, key_of
from evalq.run.outcome import failed_record, scored_record, with_reference
from evalq.run.predict import predict, require_fit
from evalq.run.prepare_data import Data, choose_tokenizer, tokenized
from evalq.run.prepare_model import Prepared, prepare
from evalq.run.process import Event, RunSettings, WorkerSettings, run_worker
from evalq.run.scoring import check_positions
from evalq.spec import DataSpec, ModelSpec, require_unique_labels


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
    ordered = sorted(specs, key=lambda spec: spec.out_logits is None)
    prepared = [_prepare(spec, store, settings.offline) for spec in ordered]
    chosen = choose_tokenizer(data_spec, ordered, prepared, settings.offline)
    data = tokenized(data_spec, text, chosen, store, settings, reporter.status)
    records = []
    for spec, model in zip(ordered, prepared, strict=True):
        reporter.model(spec.plain_label, len(data.plan.windows))
        record, cached = _score(spec, model, data, store, settings, reporter)
        reporter.record(record, cached)
        records.append(record)
    return with_reference(records, ordered, store)


def _prepare(spec: ModelSpec, store: Store, offline: bool) -> Prepared | ModelError:
    try:
        return prepare(spec, store, offline)
    except ModelError as error:
        return error


def _score(
    spec: ModelSpec,
    model: Prepared | ModelError,
    data: Data,
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> tuple[ResultRecord, bool]:
    if isinstance(model, ModelError):
        return failed_record(spec, None, data, model, None), False
    identity = {**data.comparison, **model.identity}
    key = key_of(identity)
    result = store.result(key)
    if settings.clear_cache:
        result.clear()
    try:
        if result.scores() is not None:
            return scored_record(model, data, identity, result), True
        check_positions(model.checkpoint.max_positions, data.plan)
        write_json(result.path / "identity.json", {"label": spec.plain_label, **identity})
        prediction = predict(model, data.plan)
        if not settings.try_anyway:
            require_fit(prediction)
        if prediction is not None:
            write_json(result.path / "predicted.json", asdict(prediction))
        worker = WorkerSettings(
            model.python, settings.timeout_seconds, settings.offline, result.path / "worker.log"
        )
        _run_scoring(_score_job(model, data, result), worker, reporter)
        write_json(result.path / "environment.json", environment())
        return scored_record(model, data, identity, result), False
    except ModelError as error:
        failure = {"category": error.category, "message": error.message, "remedy": remedy_of(error)}
        write_json(result.path / "failure.json", failure)
        return failed_record(spec, model, data, error, key), False


def _run_scoring(job: dict[str, Any], worker: WorkerSettings, reporter: Reporter) -> None:
    """Run a worker to its end; once more with half as much at once if it runs out of memory while scoring."""
    try:
        run_worker(job, worker, reporter.event)
    except ModelError as error:
        if error.category != "oom_forward":
            raise
        reporter.status(f"out of memory ({error.message}): once more with half as much at once")
        run_worker(job | {"divide_work": 2}, worker, reporter.event)


def _score_job(model: Prepared, data: Data, result: ResultDir) -> dict[str, Any]:
    return {
        "kind": "score",
        "load": model.engine.load,
        "forward": model.engine.forward,
        "load_fn": model.spec.load_fn,
        "path": str(model.files.path),
        "overlay": None if model.files.overlay is None else str(model.files.overlay),
        "options": model.engine.options,
        "trust_remote_code": model.spec.trust_remote_code,
        "tokens_file": str(data.tokens_file.resolve()),
        "max_tokens": data.spec.max_tokens,
        "settings": asdict(data.settings),
        "result_dir": str(result.path.resolve()),
        "lora": None
        if model.adapter is None
        else {"path": str(model.adapter.path), "name": model.adapter.name},
        "divide_work": 1,
    }
