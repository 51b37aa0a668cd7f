"""Spec files: found, read, checked. Every error names the file and the place.

Spec files are JSON. A data spec is one object; a model spec file holds a list of objects, or one.
`nvfp4.json: models[0].model_dir: ...` is how an error says where.
"""

import difflib
import glob
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from evalq.errors import SpecError
from evalq.spec.base import Spec, shown
from evalq.spec.data import DataSpec
from evalq.spec.model import ModelSpec, split_engine_arguments
from evalq.spec.strict_json import read_json

_MODELS = "name model specs with -m"
_S = TypeVar("_S", bound=Spec)


def shipped_specs() -> Path:
    """The folder of specs that ship with evalq."""
    return Path(str(resources.files("evalq.specs")))


def find_spec(name: str) -> Path:
    """The spec file a command line names: where it says, else among the shipped ones.

    Raises:
        SpecError: neither exists; lists the shipped names.
    """
    for candidate in (name, f"{name}.json"):
        if is_file(Path(candidate)):
            return Path(candidate)
        if Path(candidate).name == candidate and is_file(shipped_specs() / candidate):
            return shipped_specs() / candidate
    known = ", ".join(sorted(path.name for path in shipped_specs().glob("*.json")))
    raise SpecError(f"{shown(name)}: no such file", f"shipped specs: {known}")


def is_file(path: Path) -> bool:
    """Whether a regular file is there; no for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def find_specs(names: Sequence[str]) -> list[Path]:
    """Like find_spec() for several names with wildcards; sorted within a wildcard, duplicates dropped."""
    return list(dict.fromkeys(find_spec(name) for name in expand_wildcards(names)))


def expand_wildcards(names: Sequence[str]) -> list[str]:
    """Names with wildcards replaced by the files that match, here or among the shipped specs.

    Raises:
        SpecError: nothing matches.
    """
    found: list[str] = []
    for name in names:
        if any(sign in name for sign in "*?[") and not os.path.exists(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches and Path(name).name == name:
                matches = sorted(str(path) for path in shipped_specs().glob(name))
            if not matches:
                raise SpecError(f"{shown(name)}: no file matches")
            found += matches
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def load_data_spec(path: Path) -> DataSpec:
    """A data spec file. Raises SpecError."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: a data spec is one JSON object", _MODELS if isinstance(raw, list) else None)
    if "load_fn" in raw and "dataset" not in raw:
        raise SpecError(f"{path}: a model spec where a data spec is expected", _MODELS)
    spec = validated(DataSpec, raw, str(path))
    spec._base = path.resolve().parent
    return spec


def load_model_specs(path: Path) -> list[ModelSpec]:
    """A model spec file. Raises SpecError."""
    raw = read_json(path)
    models = raw if isinstance(raw, list) else [raw]
    if not models:
        raise SpecError(f"{path}: holds no model")
    if isinstance(raw, dict) and "dataset" in raw and "load_fn" not in raw:
        raise SpecError(f"{path}: a data spec where model specs are expected", "name data specs with -d")
    specs = []
    for index, model in enumerate(models):
        where = f"{path}: models[{index}]"
        if not isinstance(model, dict):
            raise SpecError(f"{where}: a model is a JSON object")
        model, arguments = split_engine_arguments(model)
        spec = validated(ModelSpec, model, where)
        spec._base, spec._where, spec._engine_arguments = path.resolve().parent, where, arguments
        specs.append(spec)
    return specs


def nearest(name: str, choices: list[str]) -> str:
    """The question to ask about a misspelt name, else the list of choices."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"valid: {', '.join(sorted(choices))}"


def validated(kind: type[_S], raw: dict[str, Any], where: str) -> _S:
    """An object of a file. Raises SpecError about the first thing that is wrong, with its place."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key explains a missing one.
        first = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{shown(part, 40)}"
            for part in first["loc"]
            if part not in ("str", "list[str]", "[key]")
        )
        place = place.removeprefix(".") if where.endswith(": ") else place
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _keys_at(kind, first["loc"][:-1]))
            raise SpecError(f"{where}{place}: unknown key", hint) from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        given = ""
        if first["type"] not in ("missing", "value_error"):
            given = f", not {shown(json.dumps(first['input'], default=str))}"
        raise SpecError(f"{where}{place}: {message}{given}") from None


def _keys_at(kind: type[Spec], place: tuple[int | str, ...]) -> list[str]:
    """The keys of the object at a place within a spec."""
    for part in place:
        if part in kind.model_fields:
            kind = _spec_within(kind.model_fields[str(part)].annotation) or kind
    return list(kind.model_fields)


def _spec_within(annotation: Any) -> type[Spec] | None:
    """The kind of object in `LoraSpec | None` or `dict[str, EngineConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    return next(filter(None, map(_spec_within, get_args(annotation))), None)
