"""Everything about a model that can be known before an engine is started: files, bits, identity.

From headers alone, so that what cannot work fails in a second instead of after an hour of loading.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evalq.checkpoint.adapter import Adapter, read_adapter, require_features, require_fits
from evalq.checkpoint.bits import StorageReport
from evalq.checkpoint.fingerprint import Fingerprint, fingerprint
from evalq.checkpoint.headers import Checkpoint, open_checkpoint
from evalq.checkpoint.locate import ModelFiles, locate, locate_adapter
from evalq.engine.backend import LAYER_NOISE
from evalq.engine.interpreters import versions
from evalq.engine.registry import Engine, resolve_engine
from evalq.errors import ModelError
from evalq.files import read_json, write_json
from evalq.inspect.consistency import require_sound
from evalq.results.record import ModelFacts
from evalq.results.store import Store, key_of
from evalq.run.job import LoraJob
from evalq.spec import LoraSpec, ModelSpec
from evalq.spec.config import engine_python, python_for


@dataclass(frozen=True)
class Unprepared:
    """A model that cannot be scored, found out before any engine was started.

    Args:
        spec: as given.
        error: why not.
        remembered: the model's part of a result's identity, where its files are gone and were there once.
    """

    spec: ModelSpec
    error: ModelError
    remembered: dict[str, Any] | None = None


@dataclass(frozen=True)
class PreparedModel:
    """A model spec with what its files and environment say.

    Args:
        spec: as given.
        engine: its backends and options.
        python: interpreter of the engine's environment, None for this one.
        versions: of the engine's distributions, or of the engine elsewhere.
        remote: the engine runs elsewhere.
        files: where the model lies.
        checkpoint: its headers.
        storage: its bits.
        facts: what a record says of it.
        identity: what the model's part of a result depends on.
        legacy_identity: the same as evalq 0.1 wrote it.
        derived: made out of another checkpoint, with an adapter on top, with noise in its layers or a
            quantized KV cache.
        adapter: on top of it, or None.
    """

    spec: ModelSpec
    engine: Engine
    python: str | None
    versions: dict[str, str]
    remote: bool
    files: ModelFiles
    checkpoint: Checkpoint
    storage: StorageReport
    facts: ModelFacts
    identity: dict[str, Any]
    legacy_identity: dict[str, Any]
    derived: bool = False
    adapter: Adapter | None = None

    @property
    def for_job(self) -> dict[str, Any]:
        """The fields of ModelJob."""
        overlay, lora = self.files.overlay, self.adapter
        return {
            "load": self.engine.load,
            "forward": self.engine.forward,
            "load_fn": self.spec.load_fn,
            "path": str(self.files.path),
            "overlay": None if overlay is None else str(overlay),
            "options": self.engine.options,
            "trust_remote_code": self.spec.trust_remote_code,
            "lora": None if lora is None else LoraJob(path=str(lora.path), name=lora.name),
        }


def prepare(spec: ModelSpec, store: Store, offline: bool) -> PreparedModel | Unprepared:
    """Look a model up, measure it and fingerprint it. Raises SpecError for what the spec itself has wrong."""
    try:
        return _prepare(spec, store, offline)
    except ModelError as error:
        remembered = _recall(spec, store) if error.category in _GONE else None
        return Unprepared(spec, error, remembered)


# Categories of a model whose files cannot be had; results of an earlier run can still be shown.
_GONE = ("model_missing", "model_gated", "download_failed")


def _prepare(spec: ModelSpec, store: Store, offline: bool) -> PreparedModel:
    engine = resolve_engine(spec)
    python = python_for(spec, engine.load)
    installed = _installed_versions(engine, python)
    elsewhere = engine.loader.remote_versions(engine.options)
    found = installed if elsewhere is None else elsewhere  # what is installed here is then a client
    files = locate(spec, offline)
    checkpoint = open_checkpoint(files.path)
    notes = require_sound(checkpoint, spec.ignore_findings)
    storage = replace(checkpoint.storage, findings=(*checkpoint.storage.findings, *notes))
    adapter = None if spec.lora is None else _adapter(spec, spec.lora, engine, checkpoint, offline)
    print_ = fingerprint(checkpoint.files, store.digests)
    overlay = None
    if files.overlay is not None:
        overlay = fingerprint(open_checkpoint(files.overlay).files, store.digests).digest
    legacy = {
        "model_digest": print_.digest,
        "model_files": [list(file) for file in print_.files],
        "model_commit": files.commit,
        "overlay_digest": overlay,
        "engine": engine.load,
        "forward": engine.forward,
        "versions": found,
        "options": engine.numeric_options,
        "trust_remote_code": spec.trust_remote_code,
    }
    if adapter is not None:
        lora = fingerprint(adapter.files, store.digests).digest
        legacy |= {"lora": adapter.name, "lora_digest": lora}
        storage = _with_adapter(storage, adapter)
    identity = legacy if checkpoint.kind != "gguf" else legacy | _nameless(print_)
    write_json(store.model(spec_key(spec)), identity)
    return PreparedModel(
        spec=spec,
        engine=engine,
        python=python,
        versions=found,
        remote=elsewhere is not None,
        files=files,
        checkpoint=checkpoint,
        storage=storage,
        facts=_facts(files, checkpoint),
        identity=identity,
        legacy_identity=legacy,
        derived=adapter is not None or checkpoint.provenance is not None or _changed(engine),
        adapter=adapter,
    )


def _changed(engine: Engine) -> bool:
    """Whether options make it another model than its weights: noise in its layers, a quantized KV cache."""
    cache = engine.kv_cache
    return LAYER_NOISE in engine.options or (cache is not None and cache.quantized)


def _nameless(print_: Fingerprint) -> dict[str, Any]:
    """A GGUF file is the same model under another name; in a directory, names give files their roles."""
    digest = hashlib.sha256("".join(print_.contents).encode()).hexdigest()
    return {"model_digest": digest, "model_files": [["gguf", size] for _, size in print_.files]}


def spec_key(spec: ModelSpec) -> str:
    """What a model spec names, whatever lies there. Raises SpecError."""
    engine = resolve_engine(spec)
    names = {
        "path": os.path.abspath(spec.local(spec.main_dir)),
        "model_dir": spec.model_dir,
        "revision": spec.revision,
        "lora": None if spec.lora is None else spec.lora.model_dump(),
        "engine": [engine.load, engine.forward, engine.numeric_options],
        "trust_remote_code": spec.trust_remote_code,
    }
    return key_of(names)


def _recall(spec: ModelSpec, store: Store) -> dict[str, Any] | None:
    found = read_json(store.model(spec_key(spec)))
    return found if isinstance(found, dict) else None


def _facts(files: ModelFiles, checkpoint: Checkpoint) -> ModelFacts:
    """What a paper says of a model: where it is from, its architecture and size."""
    named = checkpoint.config.get("architectures") or [checkpoint.gguf_setting("general.architecture")]
    architecture = named[0] if isinstance(named, list) else None
    weights = checkpoint.storage.tensors
    outside = [tensor.numel for tensor in weights if tensor.kind not in ("embedding", "head")]
    return ModelFacts(
        path=str(files.path),
        hub_name=files.hub_name,
        commit=files.commit,
        architecture=architecture if isinstance(architecture, str) else None,
        parameters=sum(tensor.numel for tensor in weights),
        parameters_without_embeddings=sum(outside),
    )


def _adapter(spec: ModelSpec, lora: LoraSpec, engine: Engine, base: Checkpoint, offline: bool) -> Adapter:
    """The adapter of a spec. Raises ModelError unless it goes on this engine and this base."""
    features = engine.loader.lora_features
    if features is None:
        raise ModelError(
            f"{spec.where}.lora: {engine.load} applies no adapters",
            "bad_adapter",
            "merge it: evalq merge-lora",
        )
    adapter = read_adapter(locate_adapter(spec, lora, offline), lora.plain_name)
    if (adapter.kind == "gguf") != bool(base.gguf):
        raise ModelError(
            f"{adapter.path} is an adapter for {'llama.cpp' if adapter.kind == 'gguf' else 'PEFT'}",
            "bad_adapter",
            "convert it with llama.cpp's convert_lora_to_gguf.py and name the file"
            if base.gguf
            else "name PEFT's directory",
        )
    require_features(adapter, features, engine.load)
    require_fits(adapter, base.linear_shapes)
    return adapter


def _with_adapter(storage: StorageReport, adapter: Adapter) -> StorageReport:
    """The base's sizes with the adapter's bytes among those of its layers, like any other sidecar."""
    return replace(
        storage,
        format=f"{storage.format} + LoRA r{adapter.rank}",
        layer_bytes=storage.layer_bytes + adapter.bytes,
        disk_bytes=storage.disk_bytes + adapter.bytes,
    )


def _installed_versions(engine: Engine, python: str | None) -> dict[str, str]:
    found = versions(engine.load, python)
    if not found:
        where = "" if python is None else f" for {python}"
        message = f'the engine of "{engine.load}" is not installed{where}'
        raise ModelError(message, "engine_missing", engine.loader.install)
    return found


def tokenizer_identity(backend_name: str, path: Path, store: Store) -> dict[str, Any] | None:
    """What a tokenizer's ids depend on beside the text; None where there are no tokenizer files."""
    files = tokenizer_files(path)
    if not files:
        return None
    return {
        "backend": backend_name,
        "files": fingerprint(files, store.digests).digest,
        "versions": versions(backend_name, engine_python(backend_name)),
    }


def tokenizer_files(path: Path) -> list[Path]:
    """The files a tokenizer is made of: in a directory by name, else the GGUF file itself."""
    if path.is_file():
        return [path]
    names: tuple[str, ...] = (
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
    )
    names += ("chat_template.*", "added_tokens.json", "config.json")
    return sorted({file for name in names for file in path.glob(name) if file.is_file()})
