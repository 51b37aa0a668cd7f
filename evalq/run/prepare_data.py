"""A data spec made concrete: its text, its tokens, its windows."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evalq.checkpoint.locate import locate
from evalq.data.protocols import PROTOCOLS
from evalq.data.sources import Text, settings_of
from evalq.data.tokens import TokenStream, cut, read_stream
from evalq.data.windows import ProtocolSettings, WindowPlan, plan_windows, stream_special_tokens
from evalq.engine.failures import remedy_of
from evalq.engine.registry import tokenizer_backend
from evalq.errors import DataError, ModelError
from evalq.files import read_json, write_json
from evalq.results.metrics import TextScale
from evalq.results.store import Store, key_of
from evalq.run.job import ChatKind, TokenizeJob
from evalq.run.prepare_model import (
    PreparedModel,
    Unprepared,
    spec_key,
    tokenizer_files,
    tokenizer_identity,
)
from evalq.run.process import RunSettings, WorkerSettings, run_worker
from evalq.spec import DataSpec, ModelSpec
from evalq.spec.config import engine_python


@dataclass(frozen=True)
class PreparedData:
    """A data spec made concrete.

    Args:
        text: what was tokenized.
        stream: its tokens, already cut to max_tokens.
        tokens_file: where the uncut stream is kept.
        settings: the protocol's.
        plan: the windows.
        comparison: what two results must share to be compared.
        scale: bytes and words of the scored text.
        notes: what a reader of any result on it should know, a line each.
    """

    spec: DataSpec
    text: Text
    stream: TokenStream
    tokens_file: Path
    settings: ProtocolSettings
    plan: WindowPlan
    comparison: dict[str, Any]
    scale: TextScale
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer makes the stream.

    Args:
        backend: that reads it.
        path: its directory or file; None where it is gone, and only its kept streams can be used.
        trust_remote_code: whether the checkpoint's own code may run.
        python: interpreter of the backend, None for this one.
        depends_on: what the ids depend on beside the text, for the store's key.
    """

    backend: str
    path: Path | None
    trust_remote_code: bool
    python: str | None
    depends_on: dict[str, Any]


def tokenized(
    spec: DataSpec,
    text: Text,
    chosen: TokenizerChoice,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
    with_bytes: bool = False,
) -> PreparedData:
    """Tokenize a text, or read its tokens back from the store, and lay the windows over them.

    Raises:
        DataError: as `stream_of`, or the text is too short for the protocol.
    """
    whole, tokens_file = stream_of(spec, text, chosen, store, settings, say, with_bytes)
    return laid_out(spec, text, whole, tokens_file)


def stream_of(
    spec: DataSpec,
    text: Text,
    chosen: TokenizerChoice,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
    with_bytes: bool = False,
) -> tuple[TokenStream, Path]:
    """A text's tokens and the file that keeps them.

    Args:
        spec: of the data.
        text: what to tokenize.
        chosen: with which tokenizer.
        store: keeps the tokens.
        settings: of the tokenizer's process.
        say: told that it takes a while.
        with_bytes: how many bytes each token stands for has to be known, which older streams do not hold.

    Raises:
        DataError: the tokenizer fails.
    """
    special = stream_special_tokens(spec.protocol, spec.bos)
    chat: ChatKind = ""
    if PROTOCOLS[spec.protocol].text == "conversations":
        chat = "answers" if spec.generate is None else "prompts"
    depends_on = chosen.depends_on | {"special": special, "chat_template": spec.chat_template}
    depends_on |= {"chat": chat} if chat else {}
    tokens_file = store.tokens(key_of({"kind": "tokens", "text": text.sha256, "tokenizer": depends_on}))
    whole = read_stream(tokens_file)
    asked_first = with_bytes and whole is not None and whole.bytes_N is None and whole.bytes_unknown is None
    if whole is None or asked_first:
        job = _job(chosen, text, tokens_file, special=special, template=spec.chat_template, chat=chat)
        _tokenize(job, chosen, text, store, settings, say)
        whole = read_stream(tokens_file)
    if whole is None:
        raise DataError(f"cannot read back the tokens {tokens_file}")
    return whole, tokens_file


def laid_out(
    spec: DataSpec, text: Text, whole: TokenStream, tokens_file: Path, notes: tuple[str, ...] = ()
) -> PreparedData:
    """The windows of a data spec over a kept stream. Raises DataError where it is too short.

    Args:
        spec: of the data.
        text: as found.
        whole: its tokens.
        tokens_file: where they are kept.
        notes: on how they were made.
    """
    stream = cut(whole, spec.max_tokens)
    protocol = settings_of(spec, stream.prefix_ids)
    plan = plan_windows(protocol, stream.facts, stream.mask_N)
    return PreparedData(
        spec,
        text,
        stream,
        tokens_file,
        protocol,
        plan,
        _comparison(text, stream, protocol, plan),
        _scale(text, whole, stream, spec, protocol),
        (*notes, *_cut_notes(stream, protocol, plan)),
    )


def choose_tokenizer(
    spec: DataSpec, models: Sequence[PreparedModel | Unprepared], store: Store, offline: bool
) -> TokenizerChoice:
    """tokenizer_dir, else the first model's files, were its engine installed or not.

    What the choice depends on is remembered, for a run whose models' files are gone.

    Raises:
        DataError: there is none.
        SpecError: tokenize_fn is no backend with tokenizers.
    """
    if spec.tokenizer_dir is not None:
        stand_in = ModelSpec(load_fn="hf", model_dir=spec.tokenizer_dir)
        stand_in._base, stand_in._where = spec._base, "data spec tokenizer_dir"
        try:
            path = locate(stand_in, offline, tokenizer_only=True).path
        except ModelError as error:
            raise DataError(error.message, remedy_of(error)) from None
        return _chosen(spec, stand_in, path, store)
    for model in models:
        if isinstance(model, PreparedModel) and tokenizer_files(model.files.path):
            return _chosen(spec, model.spec, model.files.path, store)
    for model in models:
        with contextlib.suppress(ModelError):
            path = locate(model.spec, offline, tokenizer_only=True).path
            if tokenizer_files(path):
                return _chosen(spec, model.spec, path, store)
    for model in models:
        remembered = read_json(_memory(spec, model.spec, store))
        if isinstance(remembered, dict):
            return TokenizerChoice(str(remembered.get("backend")), None, False, None, remembered)
    reasons = [str(model.error) for model in models if isinstance(model, Unprepared)]
    raise DataError(
        f"no model has tokenizer files, so there is no tokenizer{''.join(f': {why}' for why in reasons[:1])}",
        "correct the models, or set tokenizer_dir in the data spec",
    )


def _chosen(spec: DataSpec, model: ModelSpec, path: Path, store: Store) -> TokenizerChoice:
    backend = tokenizer_backend(spec.tokenize_fn, path)
    depends_on = tokenizer_identity(backend, path, store)
    if depends_on is None:
        remedy = "set tokenizer_dir to a directory with a tokenizer"
        raise DataError(f"{path} holds no tokenizer files", remedy)
    write_json(_memory(spec, model, store), depends_on)
    return TokenizerChoice(backend, path, model.trust_remote_code, engine_python(backend), depends_on)


def _memory(spec: DataSpec, model: ModelSpec, store: Store) -> Path:
    """Where what a model's tokenizer depends on is kept."""
    return store.model(key_of({"tokenizer_of": spec_key(model), "tokenize_fn": spec.tokenize_fn}))


def _job(
    chosen: TokenizerChoice,
    text: Text,
    tokens_file: Path,
    *,
    special: bool,
    template: bool,
    chat: ChatKind,
) -> TokenizeJob:
    """Raises DataError where the tokenizer's files are gone."""
    if chosen.path is None:
        raise DataError(
            "the models' files are gone, and this text was not tokenized while they were there",
            "set tokenizer_dir in the data spec",
        )
    return TokenizeJob(
        backend=chosen.backend,
        path=str(chosen.path.resolve()),
        trust_remote_code=chosen.trust_remote_code,
        documents=text.documents,
        add_special=special,
        chat_template=template,
        chat=chat,
        out=str(tokens_file.resolve()),
    )


def _tokenize(
    job: TokenizeJob,
    chosen: TokenizerChoice,
    text: Text,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> None:
    say(f"tokenizing {text.name} with {Path(job.path).name}")
    worker = WorkerSettings(
        chosen.python, settings.timeout_seconds, settings.offline, store.root / "tokenize.log"
    )
    try:
        run_worker(job, worker, lambda event: None)
    except ModelError as error:
        raise DataError(f"cannot tokenize with {job.path}: {error.message}", remedy_of(error)) from None


def _comparison(
    text: Text, stream: TokenStream, settings: ProtocolSettings, plan: WindowPlan
) -> dict[str, Any]:
    mask = {} if plan.mask_digest is None else {"mask_sha256": plan.mask_digest}
    return mask | {
        "dataset": text.name,
        "text_sha256": text.sha256,
        "tokens_sha256": stream.sha256,
        "tokens": len(stream.ids_N),
        "protocol": settings.name,
        "eval_len": settings.eval_len,
        "eval_stride": settings.stride,
        "windows": len(plan.windows),
        "tokens_scored": plan.n_counted,
        "warmup_tokens": settings.warmup_tokens,
        "bos": settings.bos,
        "prefix": list(plan.prefix),
        "plan_sha256": plan.digest,
        "unit": PROTOCOLS[settings.name].unit,
    }


def _scale(
    text: Text, whole: TokenStream, stream: TokenStream, spec: DataSpec, settings: ProtocolSettings
) -> TextScale:
    n_counted = len(whole.ids_N) if whole.mask_N is None else int(whole.mask_N.sum())
    n_bytes = sum(text.bytes_per_document)
    per_token = n_bytes / n_counted if n_bytes else None  # of answers whose text is not known
    if not PROTOCOLS[settings.name].scores_all or len(stream.ids_N) < len(whole.ids_N):
        return TextScale(bytes_per_token=per_token)
    documents = slice(None, settings.max_rows)
    return TextScale(
        n_bytes=sum(text.bytes_per_document[documents]), n_words=sum(text.words_per_document[documents])
    )


def _cut_notes(stream: TokenStream, settings: ProtocolSettings, plan: WindowPlan) -> tuple[str, ...]:
    """Conversations that do not stand whole in their window."""
    if stream.mask_N is None:
        return ()
    ends = np.asarray(stream.facts.document_ends or (len(stream.ids_N),))
    begins = np.concatenate([[0], ends[:-1]])
    used = begins <= plan.windows[-1].start
    n_long = int((ends - begins > settings.eval_len)[used].sum())
    n_left_out = int(used.sum()) - len(plan.windows)
    notes, of = [], f"{used.sum()} conversations"
    if n_long:
        notes.append(f"{n_long} of {of} are longer than eval_len, {settings.eval_len} tokens: cut there")
    if n_left_out:
        notes.append(f"{n_left_out} of {of} say nothing of the assistant's within eval_len: left out")
    return tuple(notes)
