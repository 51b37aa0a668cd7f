"""A model by name: on this machine, or on the hub from the headers of its files, without its weights.

Safetensors headers come through `huggingface_hub.get_safetensors_metadata`, a GGUF header through range
requests of `HfFileSystem`. What only the weights' own bytes tell is left out: fused NVFP4 scales, and the two
numbers of `weight_shape` (sides follow from the packed shape then).
"""

from pathlib import Path
from typing import Any

from evalq.checkpoint.damage import clipped
from evalq.checkpoint.gguf import measure_headers
from evalq.checkpoint.gguf_header import GgufHeader, parse_gguf_header, require_one_model, split_names
from evalq.checkpoint.headers import LORA_FILE, Checkpoint, open_checkpoint, read_lora
from evalq.checkpoint.hub_access import HubName, hub_answers, hub_errors, hub_name
from evalq.checkpoint.provenance import PROVENANCE_FILE, provenance
from evalq.checkpoint.safetensors import (
    QUANTIZATION_FILES,
    group,
    measure,
    quantization_config,
    read_config,
)
from evalq.checkpoint.shards import parse_entry
from evalq.errors import ModelError


def open_model(name: str, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Find a model by the name that a user gives and read its headers.

    Args:
        name: a checkpoint directory, a GGUF file, owner/name on the hub, or owner/name/file.gguf there.
        revision: branch, tag or commit on the hub; None for the main branch.
        offline: use only what is on this machine.

    Raises:
        ModelError: model_missing, model_gated, model_corrupt, unsafe_checkpoint or download_failed.
    """
    path = existing_path(name)
    if path is not None:
        return open_checkpoint(path, name)
    on_hub = hub_name(name)
    if on_hub is None:
        what = f"{clipped(name)}: no such file or directory, and no owner/name of the hub"
        raise ModelError(what, "model_missing")
    return _open_hub(name, on_hub, revision, offline)


def existing_path(name: str) -> Path | None:
    """A file or directory by the name that a user gives, None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, "~nobody", a NUL
        return None


def _open_hub(name: str, on_hub: HubName, revision: str | None, offline: bool) -> Checkpoint:
    """Headers of a model on the hub, or of its download where the hub is out of reach."""
    from huggingface_hub import HfApi, snapshot_download

    with hub_errors(name, on_hub.repo, revision):
        if offline or not hub_answers():
            folder = Path(snapshot_download(on_hub.repo, revision=revision, local_files_only=True))
            return open_checkpoint(folder / on_hub.file if on_hub.file else folder, name)
        info = HfApi().model_info(on_hub.repo, revision=revision)
        return _open_gguf(name, on_hub.file, info) if on_hub.file else _open_safetensors(name, info)


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
    for file in {"config.json", LORA_FILE, PROVENANCE_FILE, *QUANTIZATION_FILES}.intersection(files):
        folder = Path(hf_hub_download(info.id, file, revision=info.sha)).parent
    config = read_config(folder)
    contents = group(tensors, config, quantization_config(folder, config), None)
    return Checkpoint(
        name,
        Path(name),
        measure(contents),
        contents,
        lora_metadata=read_lora(folder),
        commit=info.sha,
        provenance=provenance(folder),
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
