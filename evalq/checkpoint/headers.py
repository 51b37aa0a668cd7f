"""A model's headers, read once: the one reader behind `evalq inspect`, comparisons, plans and conversions.

A model is a directory of safetensors files, a GGUF file, or (`evalq.checkpoint.hub`) a repository of the hub.
Nothing but headers and small JSON files is read: no weights, no torch.
"""

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evalq.checkpoint import damage
from evalq.checkpoint.bits import StorageReport
from evalq.checkpoint.gguf import measure_headers
from evalq.checkpoint.gguf_header import GgufHeader, read_split
from evalq.checkpoint.provenance import Provenance, provenance
from evalq.checkpoint.safetensors import QUANTIZATION_FILES, Contents, measure, read_contents
from evalq.checkpoint.shards import read_json

LORA_FILE = "lora_metadata.json"
# Where multimodal models keep the configuration of the language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# What architectures call the longest input; the first that is there wins.
POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A model as its headers and its configuration describe it.

    Args:
        name: as the user gave it.
        path: the directory, or the (first) GGUF file; of a model on the hub its name.
        storage: its bits.
        contents: of a safetensors checkpoint, else None.
        gguf: headers of the files of a GGUF model, the first with the settings; empty for safetensors.
        lora_metadata: what lora_metadata.json holds, {} without one.
        commit: of the hub, None for local files.
        files: what the scores depend on: weights, index, config, quantization settings, model code. Empty for
            a model on the hub.
        tokenizer_files: what the tokens depend on (inside the file for GGUF: empty).
        provenance: the commands of evalq that made it, None for all other checkpoints.
    """

    name: str
    path: Path
    storage: StorageReport
    contents: Contents | None = None
    gguf: tuple[GgufHeader, ...] = ()
    lora_metadata: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    files: tuple[Path, ...] = ()
    tokenizer_files: tuple[Path, ...] = ()
    provenance: Provenance | None = None

    @property
    def kind(self) -> Literal["safetensors", "gguf"]:
        """The container."""
        return "gguf" if self.contents is None else "safetensors"

    @property
    def config(self) -> dict[str, Any]:
        """The whole config.json, {} without one and for GGUF."""
        return {} if self.contents is None else self.contents.config

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """Settings of the language model, which multimodal models keep one level down."""
        nested = (self.config.get(key) for key in TEXT_CONFIGS)
        inner = next((value for value in nested if isinstance(value, dict)), {})
        return self.config | inner

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization settings, {} without any."""
        return {} if self.contents is None else self.contents.settings

    @property
    def max_positions(self) -> int | None:
        """The longest input by the configuration, None when it does not say."""
        if self.gguf:
            return positive(self.gguf_setting("context_length"))
        return self._outer_first(*POSITION_KEYS)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the vocabulary by the configuration, padding included; None when it does not say."""
        if self.gguf:
            tokens = self.gguf[0].array_lengths.get("tokenizer.ggml.tokens")
            return positive(self.gguf_setting("vocab_size") if tokens is None else tokens)
        return self._outer_first("vocab_size")

    @property
    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Module -> [out, in] of every weight; of other dimensions where the file keeps no sides."""
        if self.contents is not None:
            return self.contents.linear_shapes
        # GGUF lists the fastest-varying dimension first.
        weights = [(t.name, t.shape[::-1]) for header in self.gguf for t in header.tensors]
        return {name.removesuffix(".weight"): shape for name, shape in weights if name.endswith(".weight")}

    def integer(self, *keys: str) -> int | None:
        """The first of these settings that is a positive integer."""
        values: Iterator[Any] = (positive(self.text_config.get(key)) for key in keys)
        return next((value for value in values if value is not None), None)

    def gguf_setting(self, name: str) -> Any:
        """A setting of a GGUF model, None without one."""
        return self.gguf[0].setting(name) if self.gguf else None

    def _outer_first(self, *keys: str) -> int | None:
        """The first positive integer, of the outer configuration before that of the language model."""
        levels = [self.config, *(self.config.get(name) for name in TEXT_CONFIGS)]
        values = (positive(level.get(key)) for level in levels if isinstance(level, dict) for key in keys)
        return next((value for value in values if value is not None), None)


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Find a model's files and read its configuration and headers.

    Args:
        path: a checkpoint directory, or a GGUF file (of a split set NAME-00001-of-0000N.gguf the first part).
        name: for people; None takes the path.

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file and what is wrong.
    """
    shown = name or str(path)
    if is_gguf(path):
        parts, headers = read_split(path)
        return Checkpoint(shown, path, measure_headers(headers), gguf=headers, files=parts)
    contents = read_contents(path)
    return Checkpoint(
        shown,
        path,
        measure(contents),
        contents,
        lora_metadata=read_lora(path),
        files=_files(path, contents),
        tokenizer_files=_existing(path, _TOKENIZER_FILES),
        provenance=provenance(path),
    )


def is_gguf(path: Path) -> bool:
    """Tell a GGUF file from a checkpoint directory.

    Raises:
        ModelError: if the path is neither: model_missing, or unsafe_checkpoint for a pickle.
    """
    if path.is_dir():
        return False
    if not path.is_file():
        raise damage.missing(path, "no such file or directory")
    if path.suffix in _PICKLE_SUFFIXES:
        raise damage.pickled(path, path.parent, glob.escape(path.name))
    if path.suffix == ".safetensors":
        raise damage.missing(path, "is one file of a checkpoint", f"name its directory, {path.parent}")
    return True


def read_lora(directory: Path) -> dict[str, Any]:
    """What lora_metadata.json holds; {} without one. Raises ModelError (model_corrupt)."""
    path = directory / LORA_FILE
    return read_json(path) if path.is_file() else {}


def config_groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a compressed-tensors config, those that are objects."""
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def positive(value: Any) -> int | None:
    """A positive integer, else None."""
    return value if type(value) is int and value > 0 else None


def _files(directory: Path, contents: Contents) -> tuple[Path, ...]:
    """What the scores of a checkpoint directory depend on."""
    assert contents.shards is not None
    index = () if contents.shards.index is None else (contents.shards.index,)
    settings = _existing(directory, ("config.json", *QUANTIZATION_FILES))
    # Code the model runs is part of the model, wherever in the directory it lies.
    code = tuple(sorted(directory.rglob("*.py"))) if _has_code(contents.config) else ()
    return (*contents.shards.files, *index, *settings, *code)


def _existing(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Those of the named files that are there."""
    return tuple(directory / name for name in names if (directory / name).is_file())


def _has_code(config: dict[str, Any]) -> bool:
    """Whether config.json maps a class to Python code."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    return any(part.get("auto_map") for part in (config, *nested))
