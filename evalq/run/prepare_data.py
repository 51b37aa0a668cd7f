"""A data spec made concrete: its text, its tokens, its windows."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint.fingerprint import fingerprint
from evalq.checkpoint.locate import locate
from evalq.data.protocols import PROTOCOLS
from evalq.data.sources import Text, settings_of
from evalq.data.tokens import TokenStream, cut, read_stream
from evalq.data.windows import ProtocolSettings, WindowPlan, plan_windows, stream_special_tokens
from evalq.errors import DataError, ModelError
from evalq.failures import remedy_of
from evalq.interpreters import versions
from evalq.registry import tokenizer_backend
from evalq.results.metrics import TextScale
from evalq.results.store import Store, key_of
from evalq.run.prepare_model import Prepared, tokenizer_files
from evalq.run.process import RunSettings, WorkerSettings, run_worker
from evalq.spec import DataSpec, ModelSpec
from evalq.spec.config import engine_python


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


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer makes the stream."""

    backend: str
    path: Path
    trust_remote_code: bool
    python: str | None


def tokenized(
    spec: DataSpec,
    text: Text,
    chosen: TokenizerChoice,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> Data:
    """Tokenize a text, or read its tokens back from the store, and lay the windows over them.

    Args:
        spec: of the data.
        text: what to tokenize.
        chosen: with which tokenizer.
        store: keeps the tokens.
        settings: of the tokenizer's process.
        say: told that it takes a while.

    Raises:
        DataError: the tokenizer fails, or the text is too short for the protocol.
    """
    special = stream_special_tokens(spec.protocol, spec.bos)
    depends_on = {
        "backend": chosen.backend,
        "files": fingerprint(tokenizer_files(chosen.path), store.root / "digests.json").digest,
        "versions": versions(chosen.backend, chosen.python),
        "special": special,
        "chat_template": spec.chat_template,
    }
    tokens_file = store.tokens(key_of({"kind": "tokens", "text": text.sha256, "tokenizer": depends_on}))
    whole = read_stream(tokens_file)
    if whole is None:
        say(f"tokenizing {text.name} with {chosen.path.name}")
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


def choose_tokenizer(
    spec: DataSpec, specs: list[ModelSpec], models: list[Prepared | ModelError], offline: bool
) -> TokenizerChoice:
    """tokenizer_dir, else the first model's files, were its engine installed or not."""
    if spec.tokenizer_dir is not None:
        stand_in = ModelSpec(load_fn="hf", model_dir=spec.tokenizer_dir)
        stand_in._base, stand_in._where = spec._base, "data spec tokenizer_dir"
        try:
            path, trust = locate(stand_in, offline, tokenizer_only=True).path, False
        except ModelError as error:
            raise DataError(error.message, remedy_of(error)) from None
    else:
        for model_spec, model in zip(specs, models, strict=True):
            if isinstance(model, Prepared):
                path, trust = model.files.path, model_spec.trust_remote_code
                break
        else:
            path, trust = _files_of_failed(specs, models, offline)
    backend = tokenizer_backend(spec.tokenize_fn, path)
    return TokenizerChoice(backend, path, trust, engine_python(backend))


def _files_of_failed(
    specs: list[ModelSpec], models: list[Prepared | ModelError], offline: bool
) -> tuple[Path, bool]:
    """Files and trust of the first model that has a tokenizer, scored or not. Raises DataError."""
    for spec in specs:
        with contextlib.suppress(ModelError):
            path = locate(spec, offline, tokenizer_only=True).path
            if tokenizer_files(path):
                return path, spec.trust_remote_code
    reason = next(str(model) for model in models if isinstance(model, ModelError))
    raise DataError(
        f"no model can be read, so there is no tokenizer: {reason}",
        "correct the models, or set tokenizer_dir",
    )


def _run_tokenizer(
    chosen: TokenizerChoice,
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
