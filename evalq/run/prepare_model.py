"""Everything about a model that can be known before an engine is started: files, bits, identity.

From headers alone, so that what cannot work fails in a second instead of after an hour of loading.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from evalq.checkpoint.adapter import Adapter, read_adapter, require_features, require_fits
from evalq.checkpoint.bits import StorageReport
from evalq.checkpoint.fingerprint import fingerprint
from evalq.checkpoint.headers import Checkpoint, open_checkpoint
from evalq.checkpoint.locate import ModelFiles, locate, locate_adapter
from evalq.errors import ModelError
from evalq.inspect.consistency import require_sound
from evalq.interpreters import versions
from evalq.registry import Engine, backend, resolve_engine
from evalq.results.store import Store
from evalq.spec import LoraSpec, ModelSpec
from evalq.spec.config import python_for


@dataclass(frozen=True)
class Prepared:
    """A model spec with what its files and environment say.

    Args:
        spec: as given.
        engine: its backends and options.
        python: interpreter of the engine's environment, None for this one.
        versions: of the engine's distributions.
        files: where the model lies.
        checkpoint: its headers.
        storage: its bits.
        identity: what the model's part of a result depends on.
        adapter: on top of it, or None.
    """

    spec: ModelSpec
    engine: Engine
    python: str | None
    versions: dict[str, str]
    files: ModelFiles
    checkpoint: Checkpoint
    storage: StorageReport
    identity: dict[str, Any]
    adapter: Adapter | None = None


def prepare(spec: ModelSpec, store: Store, offline: bool) -> Prepared:
    """Look a model up, measure it and fingerprint it.

    Raises:
        SpecError: the spec names what does not exist.
        ModelError: this model cannot be scored, with the category.
    """
    engine = resolve_engine(spec)
    python = python_for(spec, engine.load)
    found = _installed_versions(engine, python)
    files = locate(spec, offline)
    checkpoint = open_checkpoint(files.path)
    notes = require_sound(checkpoint, spec.ignore_findings)
    storage = replace(checkpoint.storage, findings=(*checkpoint.storage.findings, *notes))
    adapter = None if spec.lora is None else _adapter(spec, spec.lora, engine, checkpoint, offline)
    print_ = fingerprint(checkpoint.files, store.root / "digests.json")
    overlay = None
    if files.overlay is not None:
        overlay = fingerprint(open_checkpoint(files.overlay).files, store.root / "digests.json").digest
    identity = {
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
        lora = fingerprint(adapter.files, store.root / "digests.json").digest
        identity |= {"lora": adapter.name, "lora_digest": lora}
        storage = _with_adapter(storage, adapter)
    return Prepared(spec, engine, python, found, files, checkpoint, storage, identity, adapter)


def _adapter(spec: ModelSpec, lora: LoraSpec, engine: Engine, base: Checkpoint, offline: bool) -> Adapter:
    """The adapter of a spec. Raises ModelError unless it goes on this engine and this base."""
    if engine.lora_features is None:
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
    require_features(adapter, engine.lora_features, engine.load)
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
        raise ModelError(message, "engine_missing", engine.install)
    remote = getattr(backend(engine.load), "remote_versions", None)
    if remote is not None:  # what is installed here is a client: the numbers come from elsewhere
        return cast(dict[str, str], remote(engine.options))
    return found


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
