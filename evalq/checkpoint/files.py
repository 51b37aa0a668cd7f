"""A model on disk: which files it is made of and what its configuration says, without loading it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evalq.checkpoint.gguf_header import read_gguf_header, split_parts
from evalq.checkpoint.measure import is_gguf
from evalq.checkpoint.safetensors import QUANTIZATION_FILES, read_config
from evalq.checkpoint.shards import find_shards, read_header

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
# What architectures call the longest input; the first that is there wins.
POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: the directory, or the (first) GGUF file.
        kind: the container.
        files: what the scores depend on: weights, index, config, quantization settings, model code.
        tokenizer_files: what the tokens depend on (inside the file for GGUF: empty).
        config: parsed config.json, {} without one and for GGUF.
        needs_remote_code: config.json points to Python code (`auto_map`), in the checkpoint or on the hub.
            transformers may still know the architecture itself and run without that code.
        max_positions: the longest input by the configuration, None when it does not say.
        vocab_size: rows of the vocabulary by the configuration, padding included; None when it does not say.
    """

    path: Path
    kind: Literal["safetensors", "gguf"]
    files: tuple[Path, ...]
    tokenizer_files: tuple[Path, ...]
    config: dict[str, Any]
    needs_remote_code: bool
    max_positions: int | None
    vocab_size: int | None


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a model's files and read its configuration and headers.

    Args:
        path: a checkpoint directory, or a GGUF file (of a split set the first part).

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file and what is wrong.
    """
    return _open_gguf(path) if is_gguf(path) else _open_directory(path)


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or the split set whose first part it is."""
    parts = split_parts(path)
    headers = [read_gguf_header(part) for part in parts]
    first = headers[0]
    vocab_size = first.array_lengths.get("tokenizer.ggml.tokens", first.setting("vocab_size"))
    return Checkpoint(
        path=path,
        kind="gguf",
        files=parts,
        tokenizer_files=(),
        config={},
        needs_remote_code=False,
        max_positions=_positive(first.setting("context_length")),
        vocab_size=_positive(vocab_size),
    )


def _open_directory(directory: Path) -> Checkpoint:
    """A directory of safetensors files."""
    shards = find_shards(directory)
    for file in shards.files:
        read_header(file)
    config = read_config(directory)
    settings = _existing(directory, ("config.json", *QUANTIZATION_FILES))
    index = () if shards.index is None else (shards.index,)
    # Code the model runs is part of the model, wherever in the directory it lies.
    remote = _has_code(config)
    code = tuple(sorted(directory.rglob("*.py"))) if remote else ()
    return Checkpoint(
        path=directory,
        kind="safetensors",
        files=(*shards.files, *index, *settings, *code),
        tokenizer_files=_existing(directory, _TOKENIZER_FILES),
        config=config,
        needs_remote_code=remote,
        max_positions=next((n for n in _settings(config, POSITION_KEYS) if n), None),
        vocab_size=next((n for n in _settings(config, ("vocab_size",)) if n), None),
    )


def _existing(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Those of the named files that are there."""
    return tuple(directory / name for name in names if (directory / name).is_file())


def _has_code(config: dict[str, Any]) -> bool:
    """Whether config.json maps a class to Python code."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    return any(part.get("auto_map") for part in (config, *nested))


def _settings(config: dict[str, Any], keys: tuple[str, ...]) -> list[int | None]:
    """Values of the keys; multimodal models keep those of the language model one level down."""
    levels = [config, *(config.get(name) for name in ("text_config", "llm_config", "language_config"))]
    return [_positive(level.get(key)) for level in levels if isinstance(level, dict) for key in keys]


def _positive(value: Any) -> int | None:
    """A positive integer, else None."""
    return value if type(value) is int and value > 0 else None
