"""Data specs and model specs: what to score, and on what.

Spec files are JSON. A data spec is one object; a model spec file holds a list of objects (one is accepted
too). The keys are those of exllamav3's compare_q, whose files load unchanged, plus evalq's own.
Every error names the file and the place: `nvfp4.json: models[0].model_dir: ...`.
"""

import difflib
import glob
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from evalq.errors import SpecError

_COLOR = re.compile(r"\s*\[([^\[\]]+)\]\s*$")


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSpec(_Spec):
    """The text, its tokens and the protocol: everything models under comparison share."""

    dataset: Literal["wiki2", "wikitext2", "sample", "text"] = Field(
        description='"wiki2": WikiText-2 raw test; "sample": ships with evalq; "text": any UTF-8 file at path'
    )
    path: str | None = Field(
        default=None, description="a local file: the text, or the original wiki.test.raw"
    )
    tokenize_fn: str = Field(default="auto", description='"auto", "transformers" or "gguf"')
    tokenizer_dir: str | None = Field(default=None, description="default: the first model's")
    protocol: str = Field(default="exllamav3", description="how windows are cut and which tokens count")
    eval_len: int | None = Field(default=None, ge=2, description="tokens per window; default: the protocol's")
    eval_stride: int | None = Field(default=None, ge=1, description="tokens between window starts")
    max_rows: int | None = Field(default=None, ge=0, description="at most so many windows; 0 or null: all")
    max_tokens: int | None = Field(default=None, ge=2, description="only the first tokens of the stream")
    bos: Literal["default", "never", "every_window"] = "default"
    warmup_tokens: int = Field(default=0, ge=0, description="first tokens of each window that are not scored")
    chat_template: bool = Field(default=False, description="put an empty chat in front of every window")

    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _path_of_text(self) -> Self:
        if self.dataset == "text" and self.path is None:
            raise ValueError('dataset "text" needs "path", the text file')
        if self.dataset == "sample" and self.path is not None:
            raise ValueError('dataset "sample" ships with evalq: remove "path", or use dataset "text"')
        return self

    @property
    def dataset_name(self) -> str:
        """The canonical name: "wikitext2" is an alias."""
        return "wiki2" if self.dataset == "wikitext2" else self.dataset

    def local(self, name: str) -> Path:
        """A path of this spec, relative to the file it was read from."""
        return resolve_path(name, self._base)


class LoraSpec(_Spec):
    """An adapter on top of a model."""

    path: str = Field(description="PEFT directory (or owner/name on the hub); for GGUF models a GGUF adapter")
    name: str | None = Field(
        default=None, min_length=1, description="in labels and records; default: the path's"
    )

    @property
    def plain_name(self) -> str:
        """The name, the last part of the path when there is none."""
        return self.name or Path(self.path.rstrip("/")).stem


class ModelSpec(_Spec):
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


def resolve_path(name: str, base: Path) -> Path:
    """`~` and `$VARS` expanded, relative to `base`."""
    return base / Path(os.path.expandvars(name)).expanduser()


def shipped_specs() -> Path:
    """The folder of specs that ship with evalq."""
    return Path(str(resources.files("evalq.specs")))


def find_spec(name: str) -> Path:
    """The spec file a command line names: where it says, else among the shipped ones.

    Raises:
        SpecError: neither exists; lists the shipped names.
    """
    for candidate in (name, f"{name}.json"):
        if Path(candidate).is_file():
            return Path(candidate)
        if Path(candidate).name == candidate and (shipped_specs() / candidate).is_file():
            return shipped_specs() / candidate
    known = ", ".join(sorted(path.name for path in shipped_specs().glob("*.json")))
    raise SpecError(f"{name}: no such file", f"shipped specs: {known}")


def find_specs(names: list[str]) -> list[Path]:
    """Like find_spec() for several names with wildcards; sorted within a wildcard, duplicates dropped."""
    found: list[Path] = []
    for name in names:
        if any(sign in name for sign in "*?[") and not Path(name).exists():
            matches = sorted(glob.glob(name, recursive=True))
            if not matches and Path(name).name == name:
                matches = sorted(str(path) for path in shipped_specs().glob(name))
            if not matches:
                raise SpecError(f"{name}: no file matches")
            found += [Path(match) for match in matches]
        else:
            found.append(find_spec(name))
    return list(dict.fromkeys(found))


def read_json(path: Path) -> Any:
    """A JSON file. Raises SpecError with line and column."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno} column {error.colno}"
        raise SpecError(f"{where}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None


def load_data_spec(path: Path) -> DataSpec:
    """A data spec file. Raises SpecError."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: a data spec is one JSON object")
    spec = _validated(DataSpec, raw, str(path))
    spec._base = path.resolve().parent
    return spec


def load_model_specs(path: Path) -> list[ModelSpec]:
    """A model spec file. Raises SpecError."""
    raw = read_json(path)
    models = raw if isinstance(raw, list) else [raw]
    if not models:
        raise SpecError(f"{path}: holds no model")
    specs = []
    for index, model in enumerate(models):
        where = f"{path}: models[{index}]"
        if not isinstance(model, dict):
            raise SpecError(f"{where}: a model is a JSON object")
        spec = _validated(ModelSpec, model, where)
        spec._base, spec._where = path.resolve().parent, where
        specs.append(spec)
    return specs


def require_unique_labels(specs: list[ModelSpec]) -> None:
    """Raise SpecError for two models with one label: a table or chart could not tell them apart."""
    seen: dict[str, ModelSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.plain_label, spec)
        if other is not spec:
            raise SpecError(
                f'{spec.where}.label: "{spec.plain_label}" is also the label of {other.where}',
                "give each model a label of its own",
            )


def nearest(name: str, choices: list[str]) -> str:
    """The question to ask about a misspelt name, else the list of choices."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"valid: {', '.join(sorted(choices))}"


_S = TypeVar("_S", bound=_Spec)


def _validated(kind: type[_S], raw: dict[str, Any], where: str) -> _S:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(
            f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if p not in ("str", "list[str]")
        )
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            fields = list(kind.model_fields)
            raise SpecError(f"{where}{place}: unknown key", nearest(name, fields)) from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        given = (
            ""
            if first["type"] in ("missing", "value_error")
            else f", not {json.dumps(first['input'], default=str)[:80]}"
        )
        raise SpecError(f"{where}{place}: {message}{given}") from None
