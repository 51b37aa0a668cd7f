"""A model's headers, wherever it lies: a directory, a GGUF file, or (`evalq.checkpoint.hub`) the hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evalq.checkpoint.bits import StorageReport
from evalq.checkpoint.gguf import measure_headers
from evalq.checkpoint.gguf_header import GgufHeader, read_gguf_header, split_parts
from evalq.checkpoint.measure import is_gguf
from evalq.checkpoint.safetensors import Contents, measure, read_contents
from evalq.checkpoint.shards import read_json

LORA_FILE = "lora_metadata.json"
# Where multimodal models keep the configuration of the language model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Source:
    """What all that `evalq inspect` says is derived from.

    Args:
        name: as the user gave it.
        storage: its bits.
        contents: of a safetensors checkpoint, else None.
        gguf: headers of the files of a GGUF model, the first with the settings; empty for safetensors.
        lora_metadata: what lora_metadata.json holds, {} without one.
        commit: of the hub, None for local files.
    """

    name: str
    storage: StorageReport
    contents: Contents | None = None
    gguf: tuple[GgufHeader, ...] = ()
    lora_metadata: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The whole config.json, {} for GGUF."""
        return {} if self.contents is None else self.contents.config

    @property
    def text_config(self) -> dict[str, Any]:
        """Settings of the language model, which multimodal models keep one level down."""
        nested = (self.config.get(key) for key in TEXT_CONFIGS)
        inner = next((value for value in nested if isinstance(value, dict)), {})
        return self.config | inner

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization settings, {} without any."""
        return {} if self.contents is None else self.contents.settings

    def integer(self, *keys: str) -> int | None:
        """The first of these settings that is a positive integer."""
        values: Iterator[Any] = (self.text_config.get(key) for key in keys)
        return next((value for value in values if type(value) is int and value > 0), None)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Module -> [out, in] of every weight; of other dimensions where the file keeps no sides."""
        if self.contents is not None:
            return self.contents.linear_shapes
        # GGUF lists the fastest-varying dimension first.
        weights = [(t.name, t.shape[::-1]) for header in self.gguf for t in header.tensors]
        return {name.removesuffix(".weight"): shape for name, shape in weights if name.endswith(".weight")}

    def gguf_setting(self, name: str) -> Any:
        """A setting of a GGUF model, None without one."""
        return self.gguf[0].setting(name) if self.gguf else None


def config_groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a compressed-tensors config, those that are objects."""
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def open_local(path: Path, name: str | None = None) -> Source:
    """Read the headers of a checkpoint directory or GGUF file.

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file and what is wrong.
    """
    shown = name or str(path)
    if is_gguf(path):
        headers = tuple(map(read_gguf_header, split_parts(path)))
        return Source(shown, measure_headers(headers), gguf=headers)
    contents = read_contents(path)
    return Source(shown, measure(contents), contents, lora_metadata=read_lora(path))


def read_lora(directory: Path) -> dict[str, Any]:
    """What lora_metadata.json holds; {} without one. Raises ModelError (model_corrupt)."""
    path = directory / LORA_FILE
    return read_json(path) if path.is_file() else {}
