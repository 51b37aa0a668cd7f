"""model_dir -> files on this machine, downloading from the hub when it is a hub name.

A `model_dir` that exists beside its spec file is local. One that does not, and looks like `owner/name` or
`owner/name/file.gguf`, is a repository of huggingface.co. Only what is needed is fetched: safetensors, GGUF,
JSON and tokenizer files; never pickles, and Python code only where the spec allows remote code.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from evalq.errors import ModelError
from evalq.spec import LoraSpec, ModelSpec

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_FILE = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/((?:[\w.-]+/)*[\w.-]+\.gguf)$")
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
    file_match = _HUB_FILE.match(spec.main_dir)
    if _HUB_NAME.match(spec.main_dir) or file_match:
        return _from_hub(
            spec, path, offline, _TOKENIZER if tokenizer_only else [*_TOKENIZER, "*.safetensors"]
        )
    raise ModelError(f"{spec.where}.model_dir: {path} does not exist", "model_missing")


def locate_adapter(spec: ModelSpec, lora: LoraSpec, offline: bool) -> Path:
    """The adapter of a model spec: beside the spec file, else a repository of the hub.

    Raises:
        ModelError: model_missing, model_gated or download_failed.
    """
    path = spec.local(lora.path)
    if path.exists():
        return path.resolve()
    if not _HUB_NAME.match(lora.path):
        raise ModelError(f"{spec.where}.lora.path: {path} does not exist", "model_missing")
    stand_in = ModelSpec(load_fn=spec.load_fn, model_dir=lora.path)
    stand_in._where = f"{spec.where}.lora"
    return _from_hub(stand_in, path, offline, ["adapter_config.json", "adapter_model.safetensors"]).path


def _from_hub(spec: ModelSpec, path: Path, offline: bool, wanted: list[str]) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    file_match = _HUB_FILE.match(spec.main_dir)
    repo = file_match.group(1) if file_match else spec.main_dir
    if file_match:
        wanted = [_SPLIT.sub(r"-*-of-\1.gguf", file_match.group(2))]
    elif spec.trust_remote_code:
        wanted = [*wanted, "*.py"]
    what = f"{spec.where}.model_dir: {spec.main_dir}"
    nowhere = f"{what} is neither a local path ({path}) nor "
    try:
        folder = Path(
            snapshot_download(repo, revision=spec.revision, allow_patterns=wanted, local_files_only=offline)
        )
    except GatedRepoError:
        remedy = f"accept its terms on https://huggingface.co/{repo}, then: hf auth login"
        raise ModelError(f"{what} is gated", "model_gated", remedy) from None
    except RevisionNotFoundError:
        raise ModelError(f'{what} has no revision "{spec.revision}"', "model_missing") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{nowhere}a public model on huggingface.co", "model_missing") from None
    except LocalEntryNotFoundError:
        remedy = "download it on a machine with a network, or correct the path"
        raise ModelError(
            f"{nowhere}a downloaded hub model, and the hub is out of reach", "model_missing", remedy
        ) from None
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {first[0]}", "download_failed") from None
    target = folder / file_match.group(2) if file_match else folder
    if not target.exists():
        raise ModelError(f"{what}: the repository holds no such file", "model_missing")
    return ModelFiles(target, None, repo, folder.name)
