"""Names in specs -> the code behind them, looked up when they are needed.

Backends come through the entry-point group `evalq.backends`, the built-in ones too: a package that declares

    [project.entry-points."evalq.backends"]
    myengine = "my_package.my_module:MyEngine"

makes `"load_fn": "myengine"` valid. MyEngine is a subclass of `evalq.engine.backend.Backend`.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from evalq.engine.backend import Backend, Option
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError, SpecError
from evalq.spec import ModelSpec, nearest

GROUP = "evalq.backends"


@dataclass(frozen=True)
class Alias:
    """Another name for a backend, with options it implies."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)


# The names of exllamav3's compare_q, whose spec files load unchanged.
ALIASES: dict[str, Alias] = {
    "transformers": Alias("hf"),
    "transformers_auto": Alias("hf"),
    "transformers_auto_bf16": Alias("hf", {"dtype": "bfloat16"}),
    "transformers_mm": Alias("hf"),
    "llamacpp": Alias("gguf"),
    "exllamav3": Alias("exl3"),
}


@cache
def backend_names() -> dict[str, str]:
    """Every backend's name -> "module (distribution)". Raises SpecError if two distributions share one."""
    found: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        owner = f"{point.value} ({point.dist.name if point.dist else 'unknown'})"
        if found.setdefault(point.name, owner) != owner:
            raise SpecError(
                f'two packages provide the backend "{point.name}": {found[point.name]} and {owner}',
                "uninstall one of them",
            )
    return found


def canonical(name: str, where: str) -> Alias:
    """The backend behind a spec's load_fn or fwd_fn. Raises SpecError with the list of names."""
    if name in backend_names():
        return Alias(name)
    if name in ALIASES and ALIASES[name].backend in backend_names():
        return ALIASES[name]
    choices = [*backend_names(), *(n for n, a in ALIASES.items() if a.backend in backend_names())]
    hint = nearest(name, choices)
    known = f"known: {', '.join(sorted(choices))}"
    raise SpecError(
        f'{where}: unknown backend "{name}"', known if hint.startswith("valid") else f"{hint} {known}"
    )


@cache
def backend(name: str) -> Backend:
    """A backend by its canonical name; its engine is imported later, in the worker.

    Raises:
        ModelError: category engine_missing, when the package that provides it is broken, gone, or written
            for another version of evalq.
    """
    for point in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            message = f'the backend "{name}" ({point.value}) cannot be imported: {error}'
            raise ModelError(
                message, "engine_missing", "install the package that provides it again"
            ) from None
        if not (isinstance(found, type) and issubclass(found, Backend)):
            raise ModelError(
                f'the backend "{name}" ({point.value}) is no subclass of evalq.engine.backend.Backend',
                "engine_missing",
                "install a version of its package made for this version of evalq",
            )
        return found()
    raise ModelError(f'the backend "{name}" is not installed', "engine_missing")


def tokenizer_backend(name: str, path: Path) -> str:
    """The backend whose load_tokenizer() a data spec's tokenize_fn names.

    Args:
        name: a backend's name or alias; "auto" goes by what `path` is.
        path: the tokenizer's directory, or a GGUF file.

    Raises:
        SpecError: there is no such backend, or it has no tokenizers.
    """
    if name == "auto":
        return "gguf" if path.is_file() else "hf"
    found = canonical(name, "data spec tokenize_fn").backend
    if not backend(found).has_tokenizer:
        raise SpecError(
            f'data spec tokenize_fn: "{name}" has no tokenizers', 'take "auto", "transformers" or "gguf"'
        )
    return found


@dataclass(frozen=True)
class Engine:
    """The backends one model spec names, with its validated options.

    Args:
        load: canonical name of the backend that loads the model.
        forward: of the one that scores it.
        options: those of the spec over those its alias implies.
        numeric_options: the ones that change numbers by design.
        notes: what of the spec has no meaning for this engine.
    """

    load: str
    forward: str
    options: dict[str, Any]
    numeric_options: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def loader(self) -> Backend:
        """The backend that loads the model. Raises ModelError (engine_missing)."""
        return backend(self.load)

    @property
    def scorer(self) -> Backend:
        """The backend that scores it. Raises ModelError (engine_missing)."""
        return backend(self.forward)

    @property
    def kv_cache(self) -> KvCache | None:
        """Types of the KV cache that the options name. Raises ModelError (engine_missing)."""
        return self.loader.kv_cache(self.options)


def resolve_engine(spec: ModelSpec) -> Engine:
    """Look up a model spec's backends and check its options. Raises SpecError."""
    alias = canonical(spec.load_fn, f"{spec.where}.load_fn")
    forward = canonical(spec.fwd_fn or spec.load_fn, f"{spec.where}.fwd_fn").backend
    if forward != alias.backend and alias.backend not in backend(forward).scores_for:
        raise SpecError(
            f'{spec.where}.fwd_fn: "{spec.fwd_fn}" cannot score what "{spec.load_fn}" loads',
            f'leave fwd_fn out, or write "fwd_fn": "{spec.load_fn}"',
        )
    known = backend(alias.backend).options
    chosen = spec.options_for(known)
    options: dict[str, Any] = {}
    for name, value in (alias.options | chosen.options).items():
        where = chosen.where.get(name, f"{spec.where}.load_fn: {name}")
        _check_option(name, value, known, where)
        kept = _canonical(known[name], value, where)
        if kept is not None:
            options[name] = kept
    numeric = {name: value for name, value in sorted(options.items()) if known[name].numeric}
    return Engine(alias.backend, forward, options, numeric, chosen.notes)


def _check_option(name: str, value: Any, known: Mapping[str, Option], where: str) -> None:
    if name not in known:
        raise SpecError(f"{where}: unknown option", nearest(name, list(known)))
    option = known[name]
    is_bool = isinstance(value, bool)
    right_kind = bool in option.kind if is_bool else isinstance(value, option.kind)
    shown = json.dumps(value, default=str)[:80]
    if not right_kind:
        kinds = " or ".join(kind.__name__ for kind in option.kind)
        raise SpecError(f"{where}: should be {kinds}, not {shown}")
    if option.choices is not None and value not in option.choices:
        raise SpecError(f"{where}: {shown} is not one of {json.dumps(option.choices)}")
    numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
    if option.minimum is not None and any(not n >= option.minimum for n in numbers):
        raise SpecError(f"{where}: should be {option.minimum:g} or more, not {shown}")


def _canonical(option: Option, value: Any, where: str) -> Any:
    """The value as identities hold it, None where it is the default. Raises SpecError."""
    try:
        return value if option.canonical is None else option.canonical(value)
    except ValueError as error:
        raise SpecError(f"{where}: {error}") from None
