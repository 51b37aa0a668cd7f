"""One data spec, many models: the whole way from specs to records.

A model that fails becomes a record with the reason, and the next one goes on. Only what is wrong with the
data spec, the command line or the store ends the run.
"""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from evalq.config import python_for
from evalq.data import (
    Text,
    TokenStream,
    cut,
    load_text,
    read_stream,
    settings_of,
    stream_key,
)
from evalq.environment import environment
from evalq.errors import DataError, ModelError
from evalq.evaluate import check_positions
from evalq.failures import remedy_of
from evalq.fingerprint import fingerprint
from evalq.locate import locate
from evalq.metrics import TextScale
from evalq.prepare import Prepared, prepare, tokenizer_files
from evalq.protocols import PROTOCOLS
from evalq.record import ResultRecord
from evalq.registry import resolve_engine, tokenizer_backend, versions
from evalq.report import failed_record, scored_record, with_reference
from evalq.runner import Event, WorkerSettings, run_worker
from evalq.spec import DataSpec, ModelSpec, require_unique_labels
from evalq.store import ResultDir, Store, key_of, write_json
from evalq.windows import ProtocolSettings, WindowPlan, plan_windows


@dataclass(frozen=True)
class RunSettings:
    """How a comparison is carried out; nothing here changes a number."""

    offline: bool = False
    timeout_seconds: float | None = None
    clear_cache: bool = False


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


@dataclass(frozen=True)
class Data:
    """A data spec made concrete.

    Args:
        text: what was tokenized.
        stream: its tokens, already cut to max_tokens.
        tokens_file: where the uncut stream is kept.
        settings: the protocol's.
        plan: the windows.
        comparison: what two results must share to be compared.
        scale: bytes and words of the scored text.
    """

    spec: DataSpec
    text: Text
    stream: TokenStream
    tokens_file: Path
    settings: ProtocolSettings
    plan: WindowPlan
    comparison: dict[str, Any]
    scale: TextScale


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
    text = load_text(data_spec, store, settings.offline)
    ordered = sorted(specs, key=lambda spec: spec.out_logits is None)
    prepared = [_prepare(spec, store, settings.offline) for spec in ordered]
    data = _tokenized(data_spec, text, prepared, store, settings, reporter)
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


@dataclass(frozen=True)
class _TokenizerChoice:
    """Which tokenizer makes the stream."""

    backend: str
    path: Path
    trust_remote_code: bool
    python: str | None


def _tokenized(
    spec: DataSpec,
    text: Text,
    models: list[Prepared | ModelError],
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> Data:
    chosen = _choose_tokenizer(spec, models, settings.offline)
    special = _adds_special(spec)
    depends_on = {
        "backend": chosen.backend,
        "files": fingerprint(tokenizer_files(chosen.path), store.root / "digests.json").digest,
        "versions": versions(chosen.backend, chosen.python),
        "special": special,
        "chat_template": spec.chat_template,
    }
    tokens_file = store.tokens(key_of(stream_key(text, depends_on)))
    whole = read_stream(tokens_file)
    if whole is None:
        reporter.status(f"tokenizing {text.name} with {chosen.path.name}")
        _run_tokenizer(chosen, text, special, spec.chat_template, tokens_file, store, settings)
        whole = read_stream(tokens_file)
    if whole is None:
        raise DataError(f"cannot read back the tokens {tokens_file}")
    stream = cut(whole, spec.max_tokens)
    protocol = settings_of(spec, stream.prefix_ids)
    plan = plan_windows(protocol, stream.facts)
    return Data(
        spec,
        text,
        stream,
        tokens_file,
        protocol,
        plan,
        _comparison(text, stream, protocol, plan),
        _scale(text, whole, stream, spec, protocol),
    )


def _adds_special(spec: DataSpec) -> bool:
    from evalq.windows import stream_special_tokens

    return stream_special_tokens(spec.protocol, spec.bos)


def _choose_tokenizer(spec: DataSpec, models: list[Prepared | ModelError], offline: bool) -> _TokenizerChoice:
    if spec.tokenizer_dir is not None:
        stand_in = ModelSpec(load_fn="hf", model_dir=spec.tokenizer_dir)
        stand_in._base, stand_in._where = spec._base, "data spec tokenizer_dir"
        try:
            path, trust = locate(stand_in, offline, tokenizer_only=True).path, False
        except ModelError as error:
            raise DataError(error.message, remedy_of(error)) from None
    else:
        first = next((model for model in models if isinstance(model, Prepared)), None)
        if first is None:
            reason = next(str(model) for model in models if isinstance(model, ModelError))
            raise DataError(
                f"no model can be read, so there is no tokenizer: {reason}",
                "correct the models, or set tokenizer_dir",
            )
        path, trust = first.files.path, first.spec.trust_remote_code
    backend = tokenizer_backend(spec.tokenize_fn, path)
    return _TokenizerChoice(
        backend, path, trust, python_for(ModelSpec(load_fn=backend, model_dir="."), backend)
    )


def _run_tokenizer(
    chosen: _TokenizerChoice,
    text: Text,
    special: bool,
    chat_template: bool,
    tokens_file: Path,
    store: Store,
    settings: RunSettings,
) -> None:
    with tempfile.TemporaryDirectory(dir=store.root, prefix=".text-") as folder:
        texts_file = Path(folder) / "texts.json"
        texts_file.write_text(json.dumps(list(text.documents)), encoding="utf-8")
        job = {
            "kind": "tokenize",
            "backend": chosen.backend,
            "path": str(chosen.path.resolve()),
            "trust_remote_code": chosen.trust_remote_code,
            "texts_file": str(texts_file.resolve()),
            "add_special": special,
            "chat_template": chat_template,
            "out": str(tokens_file.resolve()),
        }
        log = store.root / "tokenize.log"
        worker = WorkerSettings(chosen.python, settings.timeout_seconds, settings.offline, log)
        try:
            run_worker(job, worker, lambda event: None)
        except ModelError as error:
            raise DataError(
                f"cannot tokenize with {chosen.path}: {error.message}", remedy_of(error)
            ) from None


def _comparison(
    text: Text, stream: TokenStream, settings: ProtocolSettings, plan: WindowPlan
) -> dict[str, Any]:
    return {
        "dataset": text.name,
        "text_sha256": text.sha256,
        "tokens_sha256": stream.sha256,
        "tokens": len(stream.ids_N),
        "protocol": settings.name,
        "eval_len": settings.eval_len,
        "eval_stride": settings.stride,
        "windows": len(plan.windows),
        "tokens_scored": plan.n_targets,
        "warmup_tokens": settings.warmup_tokens,
        "bos": settings.bos,
        "prefix": list(plan.prefix),
        "unit": PROTOCOLS[settings.name].unit,
    }


def _scale(
    text: Text, whole: TokenStream, stream: TokenStream, spec: DataSpec, settings: ProtocolSettings
) -> TextScale:
    per_token = sum(text.bytes_per_document) / len(whole.ids_N)
    if PROTOCOLS[settings.name].unit == "token" or len(stream.ids_N) < len(whole.ids_N):
        return TextScale(bytes_per_token=per_token)
    documents = slice(None, settings.max_rows)
    return TextScale(
        n_bytes=sum(text.bytes_per_document[documents]), n_words=sum(text.words_per_document[documents])
    )
