"""A worker's job: windows -> backend -> per-token columns, kept as they come."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.checkpoint.adapter import read_adapter
from evalq.data.tokens import TokenStream, cut, read_stream
from evalq.data.windows import Window, WindowPlan, plan_windows
from evalq.engine.backend import Backend, Batch, LoadedModel, LoadRequest, Scores
from evalq.engine.columns import KLD_COLUMNS, LOGPROB, REFERENCE_ROWS
from evalq.engine.kv_cache import cache_of
from evalq.engine.registry import backend
from evalq.errors import ModelError, StoreError
from evalq.files import write_json
from evalq.machine import environment
from evalq.results.experts import EXPERTS, to_facts
from evalq.results.kept import NOT_KEPT, KeptInputs, KeptReference, stored_names
from evalq.results.store import Held, ResultDir
from evalq.results.tokens import Part, Timing
from evalq.run.cache_check import check_cache
from evalq.run.checks import check_model, check_reference, check_scores, given_columns
from evalq.run.job import ScoreJob, TextJob, other_evalq
from evalq.run.peak import peak_bytes, reset_peak, resident_bytes
from evalq.run.steps import step_tokens

GIB = 2**30
# Rounds of scoring what cannot be read back; a disk that loses more than that is broken.
ROUNDS = 3
Emit = Callable[..., None]


def score(job: ScoreJob, emit: Emit) -> None:
    """Score every window of every text that the store does not hold yet, with the model loaded once.

    A text that this model cannot be fed is told as an event, and the others are scored.

    Raises:
        ModelError: the model cannot be loaded, or not score the text that was begun last.
        StoreError: scores cannot be kept or read back.
    """
    with ExitStack() as locks:
        told = _Once(emit, "waiting")
        # All of them before anything is loaded, in one order for all processes: so no two processes load one
        # model for the same texts, and none waits for a result of which the other waits for another.
        for folder in sorted(text.result_dir for text in job.texts):
            locks.enter_context(ResultDir(Path(folder)).lock(on_wait=told))
        left = [text for text in [_Text.read(job, text) for text in job.texts] if not text.complete]
        if not left:
            return
        for text in left:
            write_json(text.result.path / "identity.json", text.job.identity)
        _require_same_engine(job)
        emit("loading")
        loaded = _load(job, left)
        emit("loaded", seconds=loaded.seconds, device=loaded.model.device)
        fitting = _that_fit(left, loaded.model, emit)
        loaded = _with_cache_checked(job, fitting, loaded)
        for text in fitting:
            emit("text", name=text.job.name)
            _score_text(job, text, loaded, emit)
            emit("text_done", name=text.job.name)
        backend(job.load).close(loaded.model)


class _Once:
    """Tells an event the first time it is called."""

    def __init__(self, emit: Emit, event: str) -> None:
        self._emit, self._event, self._told = emit, event, False

    def __call__(self) -> None:
        if not self._told:
            self._told = True
            self._emit(self._event)


@dataclass(frozen=True)
class _Text:
    """One text of a job.

    Args:
        job: as it was sent.
        result: where scores go; the caller holds its lock.
        stream: the tokens.
        plan: the windows.
        beside: the reference's part.
    """

    job: TextJob
    result: ResultDir
    stream: TokenStream
    plan: WindowPlan
    beside: "_Beside"

    @classmethod
    def read(cls, job: ScoreJob, text: TextJob) -> "_Text":
        """Read the tokens, lay the windows over them. Raises StoreError, and ModelError for other windows."""
        stream = read_stream(Path(text.tokens_file))
        if stream is None:
            raise StoreError(f"cannot read the tokens {text.tokens_file}", "run again")
        stream = cut(stream, text.max_tokens)
        plan = plan_windows(text.settings, stream.facts, stream.mask_N)
        if plan.digest != text.plan_digest:
            raise other_evalq(sys.executable, "cuts other windows out of the same text")
        beside = _Beside.of(text, job.keep_most_bytes)
        return cls(text, ResultDir(Path(text.result_dir)), stream, plan, beside)

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the columns in the store."""
        return stored_names(self.job.columns, self.beside.kept)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.result.answers(self.plan, self.asked) and self.beside.keeps_all(self.plan)


@dataclass(frozen=True)
class _Loaded:
    """A model, and what is known of loading it.

    Args:
        model: for all texts.
        seconds: that loading took.
        memory_bytes: resident after it.
        n_notes: how many of the model's notes are about all texts.
    """

    model: LoadedModel
    seconds: float
    memory_bytes: int
    n_notes: int


def _load(job: ScoreJob, texts: Sequence[_Text]) -> _Loaded:
    """The model, with room for the longest window of all texts."""
    plans = [text.plan for text in texts]
    columns = tuple(dict.fromkeys(name for text in texts for name in text.job.columns))
    if any(text.beside.keep is not None for text in texts):
        columns = (*columns, REFERENCE_ROWS)
    request = LoadRequest(
        path=Path(job.path),
        window_tokens=max(plan.longest_tokens for plan in plans),
        targets_per_window=max(plan.most_targets for plan in plans),
        options=job.options,
        trust_remote_code=job.trust_remote_code,
        overlay=Path(job.overlay) if job.overlay else None,
        load_fn=job.load_fn,
        n_windows=sum(len(plan.windows) for plan in plans),
        n_targets=sum(plan.n_targets for plan in plans),
        token_ids_max=max(int(text.stream.ids_N.max()) for text in texts),
        adapter=read_adapter(Path(job.lora.path), job.lora.name) if job.lora else None,
        divide_work=job.divide_work,
        columns=columns,
        step_tokens=step_tokens(job.options, plans, job.divide_work),
        reference=next((text.beside.kept.head() for text in texts if text.beside.kept is not None), None),
    )
    started = time.perf_counter()
    model = backend(job.load).load(request)
    seconds = time.perf_counter() - started
    if request.divide_work > 1:
        model.batch_windows = max(1, model.batch_windows // request.divide_work)
        model.notes.append("ran out of memory at first; scored with half as much at once")
    return _Loaded(model, seconds, resident_bytes(), len(model.notes))


def _that_fit(texts: Sequence[_Text], model: LoadedModel, emit: Emit) -> list[_Text]:
    """Texts that this model can be fed; why the others cannot is told."""
    fitting = []
    for text in texts:
        try:
            check_model(model, text.stream, text.plan)
        except ModelError as error:
            why = {"category": error.category, "message": error.message, "remedy": error.remedy}
            emit("text_failed", name=text.job.name, **why)
        else:
            fitting.append(text)
    return fitting


def _with_cache_checked(job: ScoreJob, texts: Sequence[_Text], loaded: _Loaded) -> _Loaded:
    """Raise ModelError (not_measured) for a quantized KV cache that is not read."""
    cache = cache_of(job.options)
    if cache is None or not cache.quantized or not texts:
        return loaded
    longest = max(texts, key=lambda text: text.plan.longest_tokens)
    loaded.model.notes += check_cache(backend(job.forward), loaded.model, cache, longest.plan, longest.stream)
    return replace(loaded, n_notes=len(loaded.model.notes))


def _score_text(job: ScoreJob, text: _Text, loaded: _Loaded, emit: Emit) -> None:
    """Score what is missing of one text and finish its result. Raises ModelError, StoreError."""
    model, scorer = loaded.model, backend(job.forward)
    del model.notes[loaded.n_notes :]  # of the text before
    columns = given_columns(scorer, model, text.job.columns)
    beside = text.beside.ready(model, text.plan)
    reset_peak()
    if model.reset_peak_memory is not None:
        model.reset_peak_memory()
    work = _Work(text.result, scorer, model, text.plan, text.stream, columns, beside, _options_text(job))
    held = work.carry_out(emit)
    _require_same_engine(job)
    run = _described(job, model, loaded.memory_bytes) | {"load_seconds": loaded.seconds}
    given = set(held.complete)
    run["columns_not_given"] = [name for name in text.asked if name not in given]
    if text.job.keep_reference is not None and beside.keep is None:
        run[NOT_KEPT] = job.keep_most_bytes
    if model.expert_tokens is not None:
        run[EXPERTS] = to_facts(model.expert_tokens(), text.result.run().get(EXPERTS))
    text.result.finish(held, run)


def _require_same_engine(job: ScoreJob) -> None:
    """Raise ModelError when an engine elsewhere is no longer the one in the results' identities.

    Asked before and after: windows in between came from this engine.
    """
    now = backend(job.load).remote_versions(job.options)
    if now is not None and now != job.versions:
        changed = sorted(
            key for key in now.keys() | job.versions.keys() if now.get(key) != job.versions.get(key)
        )
        for text in job.texts:
            ResultDir(Path(text.result_dir)).drop_parts()
        raise ModelError(
            f"the server has changed since the comparison began: {', '.join(changed)}",
            "engine_error",
            "run again: it is scored as the server it is now",
        )


def _options_text(job: ScoreJob) -> str:
    options = job.options | ({"divide_work": job.divide_work} if job.divide_work > 1 else {})
    return json.dumps(options, sort_keys=True)


@dataclass(frozen=True)
class _Beside:
    """The reference's part in a job: this model's rows are kept, or it is compared with kept ones.

    Args:
        keep: where this model's rows go, None where nobody asks for them.
        keep_most_bytes: the most they may take.
        kept: rows of the model that this one is compared with, None without.
    """

    keep: KeptReference | None
    keep_most_bytes: int | None
    kept: KeptReference | None

    @classmethod
    def of(cls, text: TextJob, keep_most_bytes: int | None) -> "_Beside":
        keep = None if text.keep_reference is None else KeptReference(Path(text.keep_reference))
        kept = None if text.reference is None else KeptReference(Path(text.reference))
        return cls(keep, keep_most_bytes, kept)

    def keeps_all(self, plan: WindowPlan) -> bool:
        """Whether every row asked for is kept."""
        return self.keep is None or bool(self.keep.there(plan).all())

    def ready(self, model: LoadedModel, plan: WindowPlan) -> "_Beside":
        """Make room for the model's rows. Where they cannot be kept its notes say why. Raises StoreError."""
        if self.keep is None:
            return self
        try:
            if model.reference_head is None:
                raise ModelError("the engine does not show what its distributions are made of", "bad_option")
            self.keep.begin(model.reference_head, plan, self.keep_most_bytes)
        except ModelError as error:
            model.notes.append(f"no KL divergence against it: {error.message}")
            return replace(self, keep=None)
        return self

    def missing(self, held: Held, columns: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """Window -> plain names of what it lacks, its rows included."""
        plain = dict(zip(stored_names(columns, self.kept), columns, strict=True))
        lacking = {
            index: tuple(plain[name] for name in names) for index, names in held.missing(plain).items()
        }
        if self.keep is not None:
            for index in np.flatnonzero(~self.keep.there(held.plan)).tolist():
                names = (LOGPROB.name, *lacking.get(index, ()), REFERENCE_ROWS)
                lacking[index] = tuple(dict.fromkeys(names))
        return dict(sorted(lacking.items()))

    def inputs(self, windows: Sequence[Window], columns: Sequence[str]) -> KeptInputs | None:
        """What a batch needs, None for columns that need nothing."""
        if self.kept is None or stored_names(columns, self.kept) == tuple(columns):
            return None
        return KeptInputs(self.kept, tuple(windows))

    def keep_rows(self, scores: Scores, windows: Sequence[Window]) -> Scores:
        """Keep the rows among a batch's scores; the rest of them. Raises ModelError, StoreError."""
        if self.keep is None or REFERENCE_ROWS not in scores:
            return scores
        rest = dict(scores)
        for window, rows, logprob in zip(windows, rest.pop(REFERENCE_ROWS), rest[LOGPROB.name], strict=True):
            self.keep.write(window, rows, logprob)
        return rest


@dataclass(frozen=True)
class _Work:
    """Everything that scoring needs.

    Args:
        result: where scores go; the caller holds its lock.
        backend: whose score() is called.
        model: loaded, checked.
        plan: the windows.
        stream: the tokens.
        columns: names of the columns that are to be complete.
        beside: the reference's part.
        options: of the engine, for the timing.
    """

    result: ResultDir
    backend: Backend
    model: LoadedModel
    plan: WindowPlan
    stream: TokenStream
    columns: tuple[str, ...]
    beside: _Beside
    options: str

    def carry_out(self, emit: Emit) -> Held:
        """Score what is missing until it can be read back from the disk.

        Raises:
            ModelError: the backend returned something else than it should.
            StoreError: scores could not be kept, or not be read back.
        """
        for _ in range(ROUNDS):
            held = self.result.held(self.plan)
            missing = self.beside.missing(held, self.columns)
            if not missing:
                return held
            self._round(missing, emit)
        held = self.result.held(self.plan)
        lost = self.beside.missing(held, self.columns)
        if lost:
            message = f"{len(lost)} windows that were written to {self.result.path} cannot be read back"
            raise StoreError(message, "check the disk, or name another folder with --store")
        return held

    def _round(self, missing: dict[int, tuple[str, ...]], emit: Emit) -> None:
        """Score the missing windows, each batch for the columns that it lacks."""
        batches = self._batches(missing)
        there = len(self.plan.windows) - len(missing)
        of = len(self.plan.windows)
        emit("progress", windows=there, of=of, tokens=0, scored=0, seconds=0.0)
        first = [batch for _, batch in batches[: int(self.model.warm_up)]]
        if first:
            list(self.backend.score(self.model, first))
        scored, seconds = 0, 0.0
        declared = {column.name: column for column in self.backend.columns}
        for windows, batch, scores, took in self._timed(batches):
            kept = check_scores(scores, batch, declared)
            check_reference(kept, batch)
            kept = self.beside.keep_rows(kept, [self.plan.windows[index] for index in windows])
            tokens = int(np.prod(batch.shape))
            stored = dict(zip(stored_names(kept, self.beside.kept), kept.values(), strict=True))
            # Speed is that of scoring alone: KL divergence has a cost of its own.
            alone = KLD_COLUMNS.isdisjoint(batch.columns)
            timing = Timing(took, tokens, self.options) if alone else Timing(options=self.options)
            part = Part(windows, stored, timing)
            self.result.write_part(part, self.plan)
            there, scored, seconds = there + len(windows), scored + tokens, seconds + took
            emit("progress", windows=there, of=of, tokens=scored, scored=scored, seconds=seconds)

    def _batches(self, missing: dict[int, tuple[str, ...]]) -> list[tuple[tuple[int, ...], Batch]]:
        """Window indices and batches, those of an unbroken run as they would have been."""
        prefix = np.asarray(self.plan.prefix, np.int64)
        found = []
        for group in self.plan.batches(self.model.batch_windows):
            by_columns: dict[tuple[str, ...], list[int]] = {}
            for index in group:
                if index in missing:
                    by_columns.setdefault(missing[index], []).append(index)
            for columns, indices in by_columns.items():
                windows = [self.plan.windows[index] for index in indices]
                ids_BT = np.stack([window.ids(self.stream.ids_N, prefix) for window in windows])
                first = windows[0].first_target(len(prefix))
                inputs: Mapping[str, NDArray[Any]] = self.beside.inputs(windows, columns) or {}
                found.append((tuple(indices), Batch(ids_BT, first, columns, inputs)))
        return found

    def _timed(
        self, batches: Sequence[tuple[tuple[int, ...], Batch]]
    ) -> Iterator[tuple[tuple[int, ...], Batch, Scores, float]]:
        """Each batch with its scores and the seconds that the engine took for them."""
        results = self.backend.score(self.model, (batch for _, batch in batches))
        for windows, batch in batches:
            began, once = time.perf_counter(), self.model.setup_seconds
            try:
                scores = next(results)
            except StopIteration:
                raise ModelError(
                    "the backend returned fewer batches than it was given", "engine_error"
                ) from None
            took = time.perf_counter() - began - (self.model.setup_seconds - once)
            yield windows, batch, scores, max(0.0, took)


def _described(job: ScoreJob, model: LoadedModel, memory_after_load: int) -> dict[str, Any]:
    """How the work was carried out, for the record. Memory in GiB."""
    peak = model.peak_memory_bytes() if model.peak_memory_bytes else peak_bytes()
    return {
        "device": model.device,
        "dtype": model.dtype,
        "batch_windows": model.batch_windows,
        "notes": model.notes,
        "versions": model.versions,
        "memory": model.memory,
        "kv_bits": model.kv_bits,
        "memory_after_load_gib": memory_after_load / GIB,
        "peak_memory_gib": peak / GIB if peak else None,
        "threads": model.versions.get("threads") or os.environ.get("OMP_NUM_THREADS"),
        "options": job.options,
        "environment": environment(),
        "interpreter": {"path": sys.executable, "python": sys.version.split()[0], "packages": _packages(job)},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _packages(job: ScoreJob) -> dict[str, str]:
    """Versions of the engine's distributions in this interpreter."""
    from evalq.engine.interpreters import versions

    return versions(job.load)
