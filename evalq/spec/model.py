"""What to score: a model, where it lies, and the engine that runs it."""

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, WithJsonSchema, field_validator

from evalq.spec.base import Name, PathText, Spec, resolve_path, shown, usable

_COLOR = re.compile(r"\s*\[([^\[\]]+)\]\s*$")
_NAMES_CACHE = re.compile(r"\b(kv|cache)", re.IGNORECASE)
_LABEL_MAX = 500
_MODEL_DIR_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "prefixItems": [{"type": "string"}, {"type": ["string", "object"]}],
            "items": False,
            "minItems": 2,
        },
    ]
}


@dataclass(frozen=True)
class ChosenOptions:
    """A spec's options for one engine.

    Args:
        options: the spec's own, with those arguments of its model_dir that the engine has too.
        where: option -> the place in the spec file that it stands at.
        notes: on what has no meaning for the engine.
    """

    options: dict[str, Any]
    where: dict[str, str]
    notes: tuple[str, ...]


def split_engine_arguments(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model spec as JSON without the arguments that stand in its model_dir, and those arguments.

    `"model_dir": [path, {"tensor_parallel_size": 2, ...}]` is how a vLLM form of compare_q hands arguments to
    vLLM's LLM class. Those that a model spec has keys for go there.
    """
    given = raw.get("model_dir")
    if not (isinstance(given, list) and len(given) == 2 and isinstance(given[1], dict)):
        return raw, {}
    keys = {k: given[1][k] for k in ("trust_remote_code", "revision") if given[1].get(k) is not None}
    others = {k: v for k, v in given[1].items() if v is not None and k not in keys}
    return keys | raw | {"model_dir": given[0]}, others


class LoraSpec(Spec):
    """An adapter on top of a model."""

    path: PathText = Field(
        description="PEFT directory (or owner/name on the hub); for GGUF models a GGUF adapter"
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=_LABEL_MAX,
        description="in labels and records; default: the path's",
    )

    @property
    def plain_name(self) -> str:
        """The name, the last part of the path when there is none."""
        return self.name or Path(self.path.rstrip("/")).stem


class ModelSpec(Spec):
    """One model on one engine."""

    load_fn: Name = Field(description="the backend that loads it: `evalq backends` lists them")
    fwd_fn: Name | None = Field(default=None, description="the backend that scores it; default: the same")
    label: str | None = Field(
        default=None, max_length=_LABEL_MAX, description='"EXL3 4.0 [purple]": group, name, [colour]'
    )
    model_dir: Annotated[str | list[str], WithJsonSchema(_MODEL_DIR_SCHEMA)] = Field(
        description="directory or GGUF file (relative to the spec file), or owner/name on the hub; "
        "a list of two puts the second one's tensors over the first one's (EXL3), "
        "or holds arguments for the engine (vLLM)",
    )
    revision: str | None = Field(
        default=None, min_length=1, max_length=255, description="branch, tag or commit on the hub"
    )
    lora: LoraSpec | None = Field(default=None, description='adapter on top: {"path": ..., "name": ...}')
    options: dict[Name, Any] = Field(default_factory=dict, description="for the engine: `evalq backends -v`")
    python: PathText | None = Field(
        default=None, description="interpreter of the engine's environment: a program that evalq will run"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    ignore_findings: bool | list[Name] = Field(
        default=False, description="score it in spite of these findings of `evalq inspect`; true: of all"
    )
    reference: bool = Field(default=False, description="the model that the others are compared with")
    out_logits: str | None = Field(
        default=None, description="compare_q's key: marks the reference, as `reference` does"
    )
    override_bpw_layer: float | None = Field(default=None, gt=0, description="bits per weight of the layers")
    override_bpw_head: float | None = Field(default=None, gt=0, description="bits per weight of the head")
    override_vram_bits: float | None = Field(default=None, gt=0, description="bits of layers and head")

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _where: str = PrivateAttr(default="")
    _engine_arguments: dict[str, Any] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("model_dir", mode="before")
    @classmethod
    def _paths(cls, given: Any) -> Any:
        paths = given if isinstance(given, list) else [given]
        if isinstance(given, list) and len(given) != 2:
            raise ValueError(
                "model_dir as a list holds two paths, the model and the overlay, or the model and arguments"
            )
        for path in paths:
            if not isinstance(path, str):
                wrong = shown(json.dumps(path, default=str))
                raise ValueError(f"input should be a valid string (a path or a hub name), not {wrong}")
            usable(path)
        return given

    @property
    def main_dir(self) -> str:
        """The model itself, without an overlay."""
        return self.model_dir[0] if isinstance(self.model_dir, list) else self.model_dir

    @property
    def plain_label(self) -> str:
        """The label without its [colour]; the last part of model_dir when there is none.

        An adapter and a type of KV cache that the label does not name are put behind it.
        """
        label = self.label if self.label is not None else Path(self.main_dir.rstrip("/")).name
        label = _COLOR.sub("", label).strip() or self.main_dir
        if self.lora is not None and self.lora.plain_name not in label:
            label = f"{label} + {self.lora.plain_name}"
        cache = str(self.options.get("kv_cache") or "auto").strip()
        if cache.lower() == "auto" or _NAMES_CACHE.search(label):
            return label
        return f"{label} kv {shown(cache, 40)}"

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

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know about how the spec was read."""
        return self._notes

    def options_for(self, known: Container[str]) -> ChosenOptions:
        """The options for an engine, `known` being the names of those it has.

        An unknown name among the spec's own options stays: it is a mistake, which the caller refuses.
        """
        there = {k: v for k, v in self._engine_arguments.items() if k in known and k not in self.options}
        foreign = [shown(name, 40) for name in self._engine_arguments if name not in known]
        where = {name: f"{self.where}.model_dir[1].{name}" for name in there}
        where |= {name: f"{self.where}.options.{shown(name, 40)}" for name in self.options}
        note = f"arguments in model_dir without a meaning for {self.load_fn}: {', '.join(foreign[:20])}"
        return ChosenOptions(there | self.options, where, (note,) if foreign else ())

    def local(self, name: str) -> Path:
        """A path of this spec, relative to the file it was read from."""
        return resolve_path(name, self._base)
