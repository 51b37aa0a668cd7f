"""The reference's own answers as a text: it answers prompts once, and all models are scored on its tokens.

A quantized model is judged there where the model itself goes. The answers are ids as they were generated,
which no tokenizer sees again; the prompts before them are context and do not count.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from evalq.data import chat
from evalq.data.sources import Text
from evalq.data.tables import read_table
from evalq.data.tokens import TokenStream, read_stream, write_stream
from evalq.engine.backend import Ids
from evalq.engine.failures import remedy_of
from evalq.engine.registry import backend
from evalq.errors import DataError, EvalqError, ModelError
from evalq.files import write_atomic, write_json
from evalq.results.answers import KeptAnswers, documents
from evalq.results.reference import Reference
from evalq.results.store import Store, key_of
from evalq.run.job import DecodeJob, DecodePiece, GenerateJob
from evalq.run.prepare_data import PreparedData, TokenizerChoice, choose_tokenizer, laid_out, stream_of
from evalq.run.prepare_model import PreparedModel, Unprepared
from evalq.run.process import Event, RunSettings, WorkerSettings, run_worker
from evalq.spec import DataSpec
from evalq.spec.data import Generate
from evalq.spec.texts import MESSAGES_COLUMN

# Prompts answered together: what a killed run loses, and what an engine needs room for.
AT_ONCE = 8


def model_of(
    reference: Reference | None, models: Sequence[PreparedModel | Unprepared]
) -> PreparedModel | Unprepared:
    """The reference among the models of a run. Raises DataError where there is none."""
    for model in models:
        if reference is not None and model.spec.plain_label == reference.label:
            return model
    raise DataError(
        '"generate": no model answers the prompts, because there is no reference',
        'name one with --reference LABEL, or "reference": true in its spec',
    )


def answered(
    spec: DataSpec,
    text: Text,
    model: PreparedModel | Unprepared,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> PreparedData:
    """Have a model answer prompts, or read its answers back from the store, and lay a window over each.

    Args:
        spec: of the data, with `generate`.
        text: the prompts.
        model: that answers.
        store: keeps the answers.
        settings: of the run.
        say: told what happens.

    Raises:
        DataError: there is no answer to score.
        StoreError: the store is at fault.
    """
    assert spec.generate is not None, "the caller knows"
    chosen = choose_tokenizer(spec, [model], store, settings.offline)
    prompts, prompts_file = stream_of(spec, text, chosen, store, settings, say)
    asked = _Asked.of(spec.generate, model, prompts, prompts_file, store)
    if settings.clear_cache:
        for prompt in asked.prompts:
            asked.kept.drop(prompt)
    if asked.missing:
        asked.generate(settings, say)
    if asked.missing:
        raise DataError(f"cannot read back the answers in {asked.kept.path}", "check the disk")
    named = replace(
        text,
        name=f"answers of {model.spec.plain_label} to {text.name}",
        bytes_per_document=asked.bytes_of_answers(text, chosen, settings),
        words_per_document=(),
    )
    return laid_out(spec, named, *asked.stream(store), asked.notes())


@dataclass(frozen=True)
class _Asked:
    """Prompts, and who answers them.

    Args:
        generate_spec: the data spec's.
        model: that answers.
        stream_of_prompts: their tokens.
        prompts_file: where these are kept.
        kept: where the answers are or go.
    """

    generate_spec: Generate
    model: PreparedModel | Unprepared
    stream_of_prompts: TokenStream
    prompts_file: Path
    kept: KeptAnswers

    @classmethod
    def of(
        cls,
        generate: Generate,
        model: PreparedModel | Unprepared,
        prompts: TokenStream,
        prompts_file: Path,
        store: Store,
    ) -> "_Asked":
        """Raises DataError for a model that cannot answer and has never answered."""
        identity = model.identity if isinstance(model, PreparedModel) else model.remembered
        if identity is None:
            assert isinstance(model, Unprepared)
            raise _cannot(model, model.error)
        limits = {"new_tokens": generate.new_tokens, "stop_ids": list(prompts.stop_ids)}
        who = {"kind": "answers", **limits, **identity}
        kept = KeptAnswers(store.answers(key_of(who)))
        write_json(kept.path / "identity.json", {"label": model.spec.plain_label, **who})
        return cls(generate, model, prompts, prompts_file, kept)

    @property
    def prompts(self) -> list[Ids]:
        """Ids of each."""
        return documents(self.stream_of_prompts)

    @property
    def answers(self) -> list[Ids]:
        """Ids of those that are kept."""
        return [found for found in map(self.kept.read, self.prompts) if found is not None]

    @property
    def missing(self) -> int:
        """Prompts without an answer."""
        return len(self.prompts) - len(self.answers)

    def generate(self, settings: RunSettings, say: Callable[[str], None]) -> None:
        """Have the model answer what is missing; once more one by one if it runs out of memory."""
        model = self.model
        if isinstance(model, Unprepared):
            raise _cannot(model, model.error)
        if not backend(model.engine.forward).generates:
            raise DataError(
                f'"generate": the reference "{model.spec.plain_label}" cannot answer prompts, because '
                f"{model.engine.forward} does not generate here",
                "name a reference in another engine with --reference: hf, gguf and vllm generate",
            )
        n, label = len(self.prompts), model.spec.plain_label
        limit = self.generate_spec.new_tokens
        say(f"{label} answers {self.missing} of {n} prompts, at most {limit} tokens each")

        def told(event: Event) -> None:
            if event["event"] == "progress":
                say(f"{label}: {event['answered']} of {n} prompts answered")

        log = self.kept.path / "worker.log"
        worker = WorkerSettings(model.python, settings.timeout_seconds, settings.offline, log)
        try:
            try:
                run_worker(self._job(model, AT_ONCE), worker, told)
            except ModelError as error:
                if error.category != "oom_forward":
                    raise
                say(f"{label}: out of memory ({error.message}): once more, one prompt at a time")
                run_worker(self._job(model, 1), worker, told)
        except ModelError as error:
            raise _cannot(model, error) from None

    def _job(self, model: PreparedModel, at_once: int) -> GenerateJob:
        return GenerateJob(
            **model.for_job,
            prompts_file=str(self.prompts_file.resolve()),
            new_tokens=self.generate_spec.new_tokens,
            at_once=at_once,
            answers_dir=str(self.kept.path.resolve()),
        )

    def stream(self, store: Store) -> tuple[TokenStream, Path]:
        """Each prompt and its answer, whose tokens count, and the file that keeps all of it."""
        prompts, answers = self.prompts, self.answers
        parts = [part for pair in zip(prompts, answers, strict=True) for part in pair]
        counts = [np.full(len(part), i % 2 == 1) for i, part in enumerate(parts)]
        ids, mask = np.concatenate(parts), np.concatenate(counts)
        sizes = [len(one) + len(other) for one, other in zip(prompts, answers, strict=True)]
        ends = np.cumsum(sizes).tolist()
        source = self.stream_of_prompts
        facts = replace(source.facts, n_tokens=len(ids), document_ends=tuple(ends))
        described = {
            "facts": asdict(facts),
            "probe_text": source.probe_text,
            "probe_ids": source.probe_ids,
            "prefix_ids": (),
        }
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        file = store.tokens(key_of({"kind": "answers", "ids": digest, "ends": ends, "described": described}))
        found = read_stream(file)
        if found is None:
            write_stream(file, ids, described, mask)
            found = read_stream(file)
        if found is None:
            raise DataError(f"cannot read back the tokens {file}", "check the disk")
        return found, file

    def notes(self) -> tuple[str, ...]:
        """Who answered, and how."""
        model, limit = self.model, self.generate_spec.new_tokens
        engine = f" by {_engine_of(model)}" if isinstance(model, PreparedModel) else ""
        stop = frozenset(self.stream_of_prompts.stop_ids)
        n_cut = sum(int(answer[-1]) not in stop for answer in self.answers)
        how = f"greedy decoding of {model.spec.plain_label}{engine}, at most {limit} tokens each"
        cut = f"; {n_cut} of {len(self.prompts)} answers did not end before that" if n_cut else ""
        return (f"the text is answers generated with {how}{cut}",)

    def bytes_of_answers(self, text: Text, chosen: TokenizerChoice, settings: RunSettings) -> tuple[int, ...]:
        """UTF-8 bytes of each answer; none where it cannot be decoded. Keeps the chats as text."""
        answers = self.answers
        name = hashlib.sha256(b"".join(answer.tobytes() for answer in answers)).hexdigest()[:16]
        file = self.kept.path / f"chats-{name}.jsonl"
        try:
            if not file.is_file():
                write_atomic(file, _as_chats(text, self._decoded(chosen, settings)))
            said = [values[-1]["content"] for values in read_table(file, MESSAGES_COLUMN).values]
        except EvalqError:
            return ()
        return tuple(len(answer.encode()) for answer in said)

    def _decoded(self, chosen: TokenizerChoice, settings: RunSettings) -> list[str]:
        """Answers as text, without the token that ends them. Raises ModelError."""
        if chosen.path is None:
            raise ModelError("the tokenizer's files are gone", "model_missing")
        stop, pieces = frozenset(self.stream_of_prompts.stop_ids), []
        for answer in self.answers:
            ids = answer[:-1] if int(answer[-1]) in stop else answer
            pieces.append(DecodePiece(before=tuple(map(int, ids)), tokens=()))
        found: list[str] = []

        def told(event: Event) -> None:
            if event["event"] == "decoded":
                found.append(str(event["before"]))

        log = self.kept.path / "decode.log"
        worker = WorkerSettings(chosen.python, settings.timeout_seconds, settings.offline, log)
        job = DecodeJob(backend=chosen.backend, path=str(chosen.path.resolve()), pieces=tuple(pieces))
        run_worker(job, worker, told)
        return found


def _as_chats(text: Text, answers: Sequence[str]) -> bytes:
    """Prompts and their answers as a table of conversations."""
    lines = []
    for document, answer in zip(text.documents, answers, strict=True):
        messages = [*chat.from_document(document), {"role": chat.ASSISTANT, "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def _engine_of(model: PreparedModel) -> str:
    name, version = next(iter(model.versions.items()))
    return f"{name} {version}"


def _cannot(model: PreparedModel | Unprepared, error: ModelError) -> DataError:
    what = f'"generate": the reference "{model.spec.plain_label}" cannot answer the prompts: {error.message}'
    return DataError(what, remedy_of(error))
