"""model_dir -> files on this machine, downloading from the hub when it is a hub name.

A `model_dir` that exists beside its spec file is local. One that does not, and looks like `owner/name` or
`owner/name/file.gguf`, is a repository of huggingface.co. Only what is needed is fetched: safetensors, GGUF,
JSON and tokenizer files; never pickles, and Python code only where the spec allows remote code.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from evalq.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
from evalq.checkpoint.hub_access import HubName, hub_answers, hub_errors, hub_name
from evalq.errors import ModelError
from evalq.spec import LoraSpec, ModelSpec

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_TOKENIZER = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies.

    Args:
        path: a checkpoint directory or a (first) GGUF file.
        overlay: a directory whose tensors replace those of `path`, or None.
        hub_name: owner/name when it came from the hub, else None.
        commit: the hub's commit, else None.
    """

    path: Path
    overlay: Path | None = None
    hub_name: str | None = None
    commit: str | None = None


def locate(spec: ModelSpec, offline: bool, tokenizer_only: bool = False) -> ModelFiles:
    """The files of a model spec, downloaded if need be, with progress on standard error.

    Args:
        spec: of the model.
        offline: use only what is already downloaded.
        tokenizer_only: leave the weights on the hub.

    Raises:
        ModelError: model_missing, model_gated or download_failed.
    """
    path = spec.local(spec.main_dir)
    overlay = spec.local(spec.model_dir[1]) if isinstance(spec.model_dir, list) else None
    if overlay is not None and not overlay.exists():
        raise ModelError(f"{spec.where}.model_dir[1]: {overlay} does not exist", "model_missing")
    if path.exists():
        return ModelFiles(path.resolve(), overlay)
    name = hub_name(spec.main_dir)
    if name is None:
        raise ModelError(f"{spec.where}.model_dir: {path} does not exist", "model_missing")
    wanted = _TOKENIZER if tokenizer_only else [*_TOKENIZER, "*.safetensors"]
    if name.file is not None:
        wanted = [_SPLIT.sub(r"-*-of-\1.gguf", name.file)]
    elif spec.trust_remote_code:
        wanted = [*wanted, "*.py"]
    what = f"{spec.where}.model_dir: {spec.main_dir}"
    return _from_hub(what, name, spec.revision, wanted, offline)


def locate_adapter(spec: ModelSpec, lora: LoraSpec, offline: bool) -> Path:
    """The adapter of a model spec: beside the spec file, else a repository of the hub.

    Raises:
        ModelError: model_missing, model_gated or download_failed.
    """
    path = spec.local(lora.path)
    if path.exists():
        return path.resolve()
    name = hub_name(lora.path)
    if name is None or name.file is not None:
        raise ModelError(f"{spec.where}.lora.path: {path} does not exist", "model_missing")
    what = f"{spec.where}.lora.path: {lora.path}"
    return _from_hub(what, name, None, [CONFIG_FILE, WEIGHTS_FILE], offline).path


def _from_hub(what: str, name: HubName, revision: str | None, wanted: list[str], offline: bool) -> ModelFiles:
    """Download what is not there yet; where the hub does not answer, what is there serves."""
    from huggingface_hub import snapshot_download

    with hub_errors(what, name.repo, revision):
        folder = Path(
            snapshot_download(
                name.repo,
                revision=revision,
                allow_patterns=wanted,
                local_files_only=offline or not hub_answers(),
            )
        )
    target = folder / name.file if name.file else folder
    if not target.exists():
        raise ModelError(f"{what}: the repository holds no such file", "model_missing")
    return ModelFiles(target, None, name.repo, folder.name)
