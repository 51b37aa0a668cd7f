"""A LoRA adapter merged into its base: W + scaling * B A, one layer at a time.

scaling is alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732), with the layer's own r
and alpha where PEFT's patterns set them. The sum is made in float32 and rounded once. A quantized base is
dequantized on the way: what comes out is dense. Agrees with PEFT's `merge_and_unload`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from evalq.checkpoint.adapter import (
    CONFIG_FILE,
    FEATURES,
    NUMBER_MAX,
    WEIGHTS_FILE,
    Adapter,
    read_adapter,
    require_fits,
)
from evalq.checkpoint.damage import clipped, corrupt
from evalq.checkpoint.name_patterns import NamePatterns
from evalq.checkpoint.safetensors import Logical
from evalq.checkpoint.shards import read_header, read_json
from evalq.convert.dense import Written, write_dense
from evalq.convert.dequantize import open_directory
from evalq.convert.target import require_new
from evalq.convert.unpack.tensors import read_tensor
from evalq.errors import ModelError

_KNOWN_FEATURES = ("rslora", "rank_pattern", "alpha_pattern", "lm_head")


def merge_lora(
    base: Path,
    adapter_path: Path,
    target: Path,
    dtype: str | None = None,
    track: Callable[[Iterable[Logical]], Iterable[Logical]] = iter,
) -> Written:
    """Write a dense checkpoint with an adapter merged into it.

    Args:
        base: a checkpoint directory, dense or of a family that can be dequantized.
        adapter_path: a PEFT directory.
        target: the directory to make.
        dtype: of the weights; None is bfloat16 for a quantized base and the base's own for a dense one.
        track: wraps the weights on their way through, to show progress.

    Raises:
        ModelError: bad_adapter for an adapter of another model (naming the module and both shapes) or with a
            feature that cannot be merged, model_corrupt, model_missing, unsupported_format.
        SpecError: the target exists.
        StoreError: it cannot be written.
    """
    require_new(target)
    checkpoint = open_directory(base)
    adapter = read_adapter(adapter_path)
    _require_mergeable(adapter)
    shapes = checkpoint.linear_shapes
    if "lm_head" in adapter.features and "lm_head" not in shapes:
        raise ModelError(
            f"adapter {adapter.name} changes lm_head, which is the embedding of {base}: "
            "merging it would change both",
            "bad_adapter",
        )
    require_fits(adapter, shapes)
    return write_dense(checkpoint, target, dtype, _Delta(adapter, shapes), track)


def _require_mergeable(adapter: Adapter) -> None:
    if adapter.kind != "peft":
        raise ModelError(
            f"{adapter.path} is a GGUF adapter",
            "bad_adapter",
            "name the PEFT directory that it was made from",
        )
    for feature in adapter.features:
        if feature not in _KNOWN_FEATURES:
            raise ModelError(
                f"adapter {adapter.name} uses {feature} ({FEATURES[feature]}), which cannot be merged here",
                "bad_adapter",
                'write a dense base ("evalq dequantize") and merge with PEFT\'s merge_and_unload',
            )


class _Delta:
    """What an adapter adds to each weight."""

    def __init__(self, adapter: Adapter, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.adapter = adapter
        self.changed: list[str] = []
        self._file = adapter.path / WEIGHTS_FILE
        self._config = read_json(adapter.path / CONFIG_FILE)
        self._alphas = _alphas(self._config.get("alpha_pattern"), adapter)
        self._patterns = NamePatterns()
        self._stored = {tensor.name: tensor for tensor in read_header(self._file)}
        self._modules = adapter.shapes
        for module in self._modules:
            if module not in base_shapes:
                raise ModelError(
                    f"adapter {adapter.name} names {clipped(module)}, which the base's files call otherwise",
                    "bad_adapter",
                    "save the base with the transformers version that trained the adapter",
                )
            for tensor in self._names(module):
                if tensor not in self._stored:
                    raise corrupt(self._file, f'has no "{clipped(tensor)}"')
        self._alpha = adapter.alpha

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight, in float32 with its part of the adapter if it has one."""
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return weight
        a_RI, b_OR = self._read(module)
        delta = b_OR @ a_RI * self._scaling(module, a_RI.shape[0])
        if self._config.get("fan_in_fan_out"):
            delta = delta.T
        if delta.shape != weight.shape:
            raise ModelError(
                f"{clipped(module)} is {list(weight.shape)} in the base, {list(delta.shape)} in the adapter",
                "bad_adapter",
            )
        self.changed.append(name)
        return weight.float() + delta

    def _names(self, module: str) -> list[str]:
        """A and B as PEFT's files name them."""
        return [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]

    def _read(self, module: str) -> list[torch.Tensor]:
        """A and B in float32."""
        with self._file.open("rb") as file:
            return [read_tensor(file, self._stored[name]).float() for name in self._names(module)]

    def _scaling(self, module: str, rank: int) -> float:
        # As PEFT matches its patterns: the end of the module's name, from a dot on.
        fitting = (
            alpha for key, alpha in self._alphas.items() if self._patterns.found(rf"^(.*\.)?({key})$", module)
        )
        alpha = next(fitting, self._alpha)
        if self._patterns.refused:
            worst = clipped(min(self._patterns.refused))
            raise ModelError(f"alpha_pattern of the adapter cannot be matched: {worst}", "bad_adapter")
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank


def _alphas(patterns: Any, adapter: Adapter) -> dict[str, float]:
    """The alpha of every pattern of modules. Raises ModelError (bad_adapter)."""
    if patterns is None:
        return {}
    if not isinstance(patterns, dict) or not all(map(_is_alpha, patterns.values())):
        what = "alpha_pattern should map names of modules to positive numbers"
        raise ModelError(f"{adapter.path / CONFIG_FILE}: {what}", "bad_adapter")
    return {str(key): float(value) for key, value in patterns.items()}


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < NUMBER_MAX
