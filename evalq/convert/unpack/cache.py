"""Dense weights of packed layers, kept in memory up to a limit.

An entry belongs to a file (path, device, inode, size, times of content and metadata), its header's SHA-256, a
weight's name and how it was unpacked. A file that was changed or replaced is another file; one that changes
while it is read is read again.
"""

import hashlib
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Hashable
from io import BufferedReader
from pathlib import Path
from threading import Lock

import torch

from evalq.checkpoint.damage import clipped, corrupt
from evalq.checkpoint.safetensors import group
from evalq.checkpoint.shards import HEADER_BYTES_MAX, ShardSet, read_header
from evalq.convert.unpack.decode import read_weight
from evalq.errors import ModelError

# Two writes within one tick of the file system's clock leave the same times, so a file is left alone until
# the tick of its last change is over; on Linux that is 10 ms at most.
_TICK_NS = 20_000_000
_TRIES = 20


class WeightCache:
    """Dense weights by file and name, the least recently used dropped first. Safe under several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes` of weights; a larger one is returned and not kept."""
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Of the weights kept now."""
        return self._bytes

    def weight(
        self, file: Path, name: str, num_bits: int = 4, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A weight of a safetensors file, unpacked.

        Args:
            file: the shard that holds the layer, codes and scales.
            name: as the unquantized model calls it, "model.layers.0.mlp.up_proj.weight".
            num_bits: of integers packed into int32.
            dtype: of the result, None for what the format's library gives.

        Returns:
            The weight [O, I]. It is shared with other callers: copy it before writing into it.

        Raises:
            ModelError: model_missing, or model_corrupt for a file or layer that is broken, a name it does
                not hold, or a file that never stops changing.
        """
        path = file.absolute()
        for _ in range(_TRIES):
            try:
                opened = path.open("rb")
            except OSError as error:
                raise ModelError(f"{path}: {error.strerror}", "model_missing") from None
            with opened:
                identity = _identity(os.fstat(opened.fileno()))
                if 0 <= time.time_ns() - max(identity[-2:]) < _TICK_NS:
                    time.sleep(_TICK_NS / 1e9)
                    continue
                key = (path, identity, _header_digest(opened), name, num_bits, dtype)
                found = self._find(key)
                if found is not None:
                    return found
                try:
                    made = _read(path, opened, name, num_bits).to(dtype)
                except ModelError:
                    if _is(path, identity):
                        raise
                    continue
                # By path and by descriptor: it was neither replaced nor written into meanwhile.
                if _is(path, identity) and _identity(os.fstat(opened.fileno())) == identity:
                    self._keep(key, made)
                    return made
        raise corrupt(path, "keeps changing while it is read")

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _find(self, key: Hashable) -> torch.Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: Hashable, weight: torch.Tensor) -> None:
        with self._lock:
            if key in self._kept or weight.nbytes > self.max_bytes:
                return
            self._kept[key] = weight
            self._bytes += weight.nbytes
            while self._bytes > self.max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes


def _read(path: Path, opened: BufferedReader, name: str, num_bits: int) -> torch.Tensor:
    """Find the weight's tensors by the header and read them from the open file."""
    settings = {"config_groups": {"all": {"weights": {"num_bits": num_bits}}}}
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    contents = group(tensors, {}, settings, ShardSet((path,), None, {}))
    for weight in contents.logical:
        if weight.bits.name == name:
            return read_weight(opened, weight, contents)
    raise corrupt(path, f'holds no weight "{clipped(name)}"')


def _header_digest(opened: BufferedReader) -> bytes:
    """SHA-256 of the header's bytes; what is wrong with them is found when they are parsed."""
    prefix = opened.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    return hashlib.sha256(prefix + opened.read(min(length, HEADER_BYTES_MAX))).digest()


def _is(path: Path, identity: tuple[int, ...]) -> bool:
    """Whether the path still names this very file."""
    try:
        return _identity(path.stat()) == identity
    except OSError:
        return False


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
