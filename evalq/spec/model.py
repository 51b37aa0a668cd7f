"""What to score: a model, where it lies, and the engine that runs it."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from evalq.spec.base import Spec, resolve_path

_COLOR = re.compile(r"\s*\[([^\[\]]+)\]\s*$")


class LoraSpec(Spec):
    """An adapter on top of a model."""

    path: str = Field(description="PEFT directory (or owner/name on the hub); for GGUF models a GGUF adapter")
    name: str | None = Field(
        default=None, min_length=1, description="in labels and records; default: the path's"
    )

    @property
    def plain_name(self) -> str:
        """The name, the last part of the path when there is none."""
        return self.name or Path(self.path.rstrip("/")).stem


class ModelSpec(Spec):
    """One model on one engine."""

    load_fn: str = Field(description="the backend that loads it: `evalq backends` lists them")
    fwd_fn: str | None = Field(default=None, description="the backend that scores it; default: the same")
    label: str | None = Field(default=None, description='"EXL3 4.0 [purple]": group, name, [colour]')
    model_dir: str | list[str] = Field(
        description="directory or GGUF file (relative to the spec file), or owner/name on the hub; "
        "a list of two puts the second one's tensors over the first one's (EXL3)"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    lora: LoraSpec | None = Field(default=None, description='adapter on top: {"path": ..., "name": ...}')
    options: dict[str, Any] = Field(default_factory=dict, description="for the engine: `evalq backends -v`")
    python: str | None = Field(default=None, description="interpreter of the engine's environment")
    trust_remote_code: bool = False
    out_logits: str | None = Field(
        default=None, description="compare_q's key; marks the unquantized reference, which is scored first"
    )
    override_bpw_layer: float | None = Field(default=None, gt=0)
    override_bpw_head: float | None = Field(default=None, gt=0)
    override_vram_bits: float | None = Field(default=None, gt=0)

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _where: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _model_dir_shape(self) -> Self:
        if isinstance(self.model_dir, list) and len(self.model_dir) != 2:
            raise ValueError("model_dir as a list holds two paths: the model and the overlay")
        if not self.main_dir.strip():
            raise ValueError("model_dir is empty")
        return self

    @property
    def main_dir(self) -> str:
        """The model itself, without an overlay."""
        return self.model_dir[0] if isinstance(self.model_dir, list) else self.model_dir

    @property
    def plain_label(self) -> str:
        """The label without its [colour]; the last part of model_dir when there is none.

        An adapter that the label does not name is put behind it.
        """
        label = self.label if self.label is not None else Path(self.main_dir.rstrip("/")).name
        label = _COLOR.sub("", label).strip() or self.main_dir
        if self.lora is None or self.lora.plain_name in label:
            return label
        return f"{label} + {self.lora.plain_name}"

    @property
    def group(self) -> str:
        """First word of the label: the series this point belongs to."""
        return self.plain_label.split()[0]

    @property
    def color(self) -> str | None:
        """What stands in the label's brackets."""
        found = _COLOR.search(self.label or "")
        return found.group(1).strip() if found else None

    @property
    def where(self) -> str:
        """File and place of this spec, for error messages."""
        return self._where

    def local(self, name: str) -> Path:
        """A path of this spec, relative to the file it was read from."""
        return resolve_path(name, self._base)
