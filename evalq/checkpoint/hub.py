"""A model on the hub, from the headers of its files: no weights are downloaded.

Safetensors headers come through `huggingface_hub.get_safetensors_metadata`, a GGUF header through range
requests of `HfFileSystem`. What only the weights' own bytes tell is left out: fused NVFP4 scales, and the two
numbers of `weight_shape` (sides follow from the packed shape then).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evalq.checkpoint.gguf import measure_headers
from evalq.checkpoint.gguf_header import GgufHeader, parse_gguf_header, require_one_model, split_names
from evalq.checkpoint.headers import LORA_FILE, Checkpoint, open_checkpoint, read_lora
from evalq.checkpoint.safetensors import (
    QUANTIZATION_FILES,
    group,
    measure,
    quantization_config,
    read_config,
)
from evalq.checkpoint.shards import parse_entry
from evalq.errors import ModelError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf)")


def open_hub(name: str, revision: str | None, offline: bool) -> Checkpoint:
    """Read a model's headers on the hub, or those of its download where the hub is out of reach.

    Args:
        name: owner/name, or owner/name/file.gguf.
        revision: branch, tag or commit; None for the main branch.
        offline: use only what is downloaded.

    Raises:
        ModelError: model_missing, model_gated, model_corrupt or download_failed.
    """
    match = HUB_FILE.fullmatch(name)
    repo, file = (match["repo"], match["file"]) if match else (name, None)
    with _hub_errors(name, revision):
        info = None if offline else _repository(repo, revision)
        if info is None:
            return _open_downloaded(name, repo, file, revision)
        return _open_gguf(name, file, info) if file else _open_safetensors(name, info)


def _repository(repo: str, revision: str | None) -> Any:
    """The hub's description of a repository; None where the hub is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(repo, revision=revision)
    except HfHubHTTPError:  # the hub has answered
        raise
    except (OfflineModeIsEnabled, HTTPError):
        return None


def _open_downloaded(name: str, repo: str, file: str | None, revision: str | None) -> Checkpoint:
    """A model that lies in the hub's cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        what = f"{name}: no such file or directory, not downloaded from the hub, and the hub is out of reach"
        raise ModelError(what, "model_missing", "correct the path, or ask again with a network") from None
    return open_checkpoint(folder / file if file else folder, name)


def _open_safetensors(name: str, info: Any) -> Checkpoint:
    """Headers of all shards, and the configuration."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    files = [sibling.rfilename for sibling in info.siblings or ()]
    try:
        repository = HfApi().get_safetensors_metadata(info.id, revision=info.sha)
    except NotASafetensorsRepoError:
        raise _no_weights(name, files) from None
    except SafetensorsParsingError as error:
        raise ModelError(f"{name}: {str(error).splitlines()[0]}", "model_corrupt") from None
    tensors = {
        tensor: parse_entry(Path(file), tensor, vars(entry), 0)
        for file, metadata in repository.files_metadata.items()
        for tensor, entry in metadata.tensors.items()
    }
    if "config.json" not in files:
        raise ModelError(f"{name}: no config.json in this repository", "model_missing")
    for file in {"config.json", LORA_FILE, *QUANTIZATION_FILES}.intersection(files):
        folder = Path(hf_hub_download(info.id, file, revision=info.sha)).parent
    config = read_config(folder)
    contents = group(tensors, config, quantization_config(folder, config), None)
    return Checkpoint(
        name, Path(name), measure(contents), contents, lora_metadata=read_lora(folder), commit=info.sha
    )


def _open_gguf(name: str, file: str, info: Any) -> Checkpoint:
    """Header of a GGUF file, or of all files of a split set."""
    from huggingface_hub import HfFileSystem

    system = HfFileSystem()
    headers: list[GgufHeader] = []
    parts = split_names(Path(file))
    for part in parts:
        with system.open(f"{info.id}@{info.sha}/{part.as_posix()}", "rb") as stream:
            headers.append(parse_gguf_header(part, stream, stream.size))
    require_one_model(parts, headers)
    return Checkpoint(name, Path(name), measure_headers(headers), gguf=tuple(headers), commit=info.sha)


def _no_weights(name: str, files: list[str]) -> ModelError:
    """Say what a repository holds instead of safetensors."""
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        what = f"{name}: holds {len(ggufs)} GGUF file{'s' if len(ggufs) > 1 else ''} on the hub"
        return ModelError(what, "model_missing", f"name one of them, such as {name}/{ggufs[0]}")
    return ModelError(f"{name}: no safetensors and no GGUF file in this repository", "model_missing")


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as one line each."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        remedy = f"accept its terms on https://huggingface.co/{name}, then: hf auth login"
        raise ModelError(f"{name} is gated", "model_gated", remedy) from None
    except RevisionNotFoundError:
        raise ModelError(f'{name} has no revision "{revision}"', "model_missing") from None
    except (RepositoryNotFoundError, EntryNotFoundError, FileNotFoundError):
        what = f"{name}: no such file or directory, and no public model of this name on huggingface.co"
        raise ModelError(what, "model_missing") from None
    except HTTPError as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: {first[0]}", "download_failed") from None
