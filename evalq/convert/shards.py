"""Tensors one after the other -> safetensors shards and their index, holding one shard in memory."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from evalq.errors import StoreError

SHARD_BYTES = 2 * 2**30


class ShardWriter:
    """Writes into `directory`; the files get their names when finish() knows how many they are."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """A shard holds at most `shard_bytes`, or one larger tensor."""
        self._directory, self._shard_bytes = directory, shard_bytes
        self._tensors: dict[str, torch.Tensor] = {}
        self._held = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor. Raises StoreError when a shard cannot be written."""
        if self._held + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._held += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Name the shards as transformers does, and write their index if there are several."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._unnamed(number).rename(self._directory / name)
        if count > 1:
            weight_map = {
                tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held
            }
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._tensors:
            file = self._unnamed(len(self._shards))
            try:
                save_file(self._tensors, file, metadata={"format": "pt"})
            except SafetensorError as error:  # the library's word for a full disk
                raise StoreError(f"cannot write {file}: {error}") from None
            self._shards.append(list(self._tensors))
            self._tensors, self._held = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self._directory / f"shard-{number:05d}"
