"""A checkpoint -> the same in plain numbers, one weight at a time.

Quantized weights become `dtype`, and so does everything else that is kept in a 16-bit float; what a model
keeps in float32 (routers, decay rates) stays. Memory: one shard of the result and one layer.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from evalq.checkpoint.adapter import Adapter
from evalq.checkpoint.fingerprint import fingerprint
from evalq.checkpoint.headers import LORA_FILE, Checkpoint
from evalq.checkpoint.provenance import PROVENANCE_FILE, Provenance, Step, write_provenance
from evalq.checkpoint.safetensors import QUANTIZATION_FILES, Contents, Logical
from evalq.convert.shards import SHARD_BYTES, ShardWriter
from evalq.convert.target import new_directory
from evalq.convert.unpack.decode import codes_of, read_weight, require_decodable
from evalq.errors import SpecError, StoreError
from evalq.version import __version__

# Weights of other containers and indexes of the old shards do not go along.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".msgpack", ".h5", ".onnx"}
)
_LEFT_OUT = frozenset({"config.json", LORA_FILE, PROVENANCE_FILE, *QUANTIZATION_FILES})
# Scales of a quantized KV cache.
_KV_ENDINGS = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".k_zero_point", ".v_zero_point")


class Merged(Protocol):
    """An adapter on its way into the weights."""

    adapter: Adapter
    changed: list[str]

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight, quantized ones in float32, with its part of the adapter; the result is rounded."""
        ...


@dataclass(frozen=True)
class Written:
    """What a conversion wrote.

    Args:
        weights: how many.
        dequantized: how many of them were quantized.
        bytes: of all.
        changed: how many an adapter changed.
    """

    weights: int
    dequantized: int
    bytes: int
    changed: int = 0


def write_dense(
    source: Checkpoint,
    target: Path,
    dtype: str | None = None,
    merged: Merged | None = None,
    track: Callable[[Iterable[Logical]], Iterable[Logical]] = iter,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write a checkpoint directory with dense weights, the tokenizer and a config without quantization.

    Args:
        source: the checkpoint, a directory of safetensors files.
        target: the directory to make; it appears when it is complete.
        dtype: bfloat16, float16 or float32; None is the checkpoint's own, bfloat16 for a quantized one.
        merged: an adapter to add to the weights, None for none.
        track: wraps the weights on their way through, to show progress.
        shard_bytes: of one file of the result.

    Raises:
        ModelError: unsupported_format or model_corrupt, naming the file and the weight.
        SpecError: the target exists, or lies inside the source.
        StoreError: it cannot be written.
    """
    if source.path.resolve() in target.resolve().parents:
        raise SpecError(f"{target} lies inside {source.path}", "name a directory elsewhere")
    contents = source.contents
    assert contents is not None
    require_decodable(contents)
    quantized = sum(weight.family is not None for weight in contents.logical)
    if dtype is None and quantized:
        dtype = "bfloat16"
    weights = [w for w in contents.logical if not (_is_scale(w, contents) and quantized)]
    with new_directory(target) as partial, ExitStack() as opened:
        _require_space(weights, partial)
        writer = ShardWriter(partial, shard_bytes)
        for shard, group in groupby(track(weights), key=lambda w: codes_of(w, contents).file):
            opened.close()
            file = opened.enter_context(shard.open("rb"))
            for weight in group:
                name, tensor = weight.bits.name, read_weight(file, weight, contents, exact=True)
                rounded = _rounded_to(tensor, weight, dtype)
                writer.add(name, (tensor if merged is None else merged.add(name, tensor)).to(rounded))
        writer.finish()
        _copy_files(source.path, partial)
        changed = 0 if merged is None else len(merged.changed)
        step = _step(source, quantized, dtype, merged)
        write_provenance(partial, Provenance((*(source.provenance.steps if source.provenance else ()), step)))
        # Last, so that what is there without it is no model to anyone.
        config = _dense_config(contents.config, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Written(len(weights), quantized, writer.total_bytes, changed)


def _step(source: Checkpoint, quantized: int, dtype: str | None, merged: Merged | None) -> Step:
    """What is done here, for whoever opens the result."""
    return Step(
        command="dequantize" if merged is None else "merge-lora",
        source=_text(source.path.resolve().name),
        source_digest=fingerprint(source.files, None).digest,
        source_format=source.storage.format,
        dequantized=quantized,
        dtype=dtype,
        adapter=None if merged is None else _text(merged.adapter.name),
        adapter_digest=None if merged is None else fingerprint(merged.adapter.files, None).digest,
        changed=0 if merged is None else len(merged.changed),
        evalq=__version__,
    )


def _text(name: str) -> str:
    """The name of a file as text; bytes that are none stay visible."""
    return name.encode("utf-8", "backslashreplace").decode()


def _is_scale(weight: Logical, contents: Contents) -> bool:
    """Whether a plain tensor is a scale that only a quantized model uses."""
    name = weight.bits.name
    return weight.family is None and (name in contents.strays or name.endswith(_KV_ENDINGS))


def _rounded_to(tensor: torch.Tensor, weight: Logical, dtype: str | None) -> torch.dtype:
    """The dtype a weight is written in."""
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return getattr(torch, dtype) if dtype and (is_half or weight.family is not None) else tensor.dtype


def _require_space(weights: list[Logical], directory: Path) -> None:
    """Raise StoreError before the work if the disk cannot hold the result (two bytes a weight)."""
    needed, free = sum(2 * w.bits.numel for w in weights), shutil.disk_usage(directory).free
    if needed > free:
        raise StoreError(
            f"the result needs {needed / 2**30:.1f} GiB, {directory.parent} has {free / 2**30:.1f} GiB free",
            "name a directory on another disk",
        )


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, model code, licence: all that is no weight and says nothing about packing."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        is_index = path.name.endswith(".index.json")
        if hidden or is_index or inside.as_posix() in _LEFT_OUT or path.suffix in _WEIGHT_SUFFIXES:
            continue
        if path.is_file():
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)


def _dense_config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json without its quantization, at both levels, and with the dtype the weights have now."""
    dense = _level(config, dtype)
    if isinstance(dense.get("text_config"), dict):
        dense["text_config"] = _level(dense["text_config"], dtype)
    return dense


def _level(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    dense = {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in dense:
            dense[key] = dtype
    return dense
