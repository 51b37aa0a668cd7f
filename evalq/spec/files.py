"""Spec files: found, read, checked. Every error names the file and the place.

Spec files are JSON. A data spec is one object; a model spec file holds a list of objects, or one.
`nvfp4.json: models[0].model_dir: ...` is how an error says where.
"""

import difflib
import glob
import json
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from evalq.errors import SpecError
from evalq.spec.base import Spec
from evalq.spec.data import DataSpec
from evalq.spec.model import ModelSpec

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
