"""evalq.toml: where each engine's own environment is, and which of these files may be used.

Engines pin conflicting versions of torch, so each may live in an environment of its own:

    [engines.vllm]
    python = ".venv-vllm/bin/python"     # relative to evalq.toml; ~ and $VARS are expanded

A model spec's "python" goes first, then the file that `--config` or $EVALQ_CONFIG names, or else the nearest
evalq.toml at or above the current folder, then the user's own (~/.config/evalq/evalq.toml on Linux).

An interpreter is a program that will be run, and a file in the current folder may have come with a download.
So one that was merely found there is used only

- in the folder that this evalq runs from (its environment or its sources lie there), unless others than the
  user can write the file, or
- in a folder that the user's own evalq.toml lists: `trusted = ["~/projects/quants"]`.

Whether a folder is a git work tree says nothing: a model cloned from the hub is one too.
"""

import os
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import Field

import evalq
from evalq.errors import SpecError
from evalq.spec.base import Name, PathText, Spec, resolve_path, shown
from evalq.spec.files import is_file, validated
from evalq.spec.model import ModelSpec
from evalq.spec.strict_json import read_text

NAME = "evalq.toml"
ENVIRONMENT_VARIABLE = "EVALQ_CONFIG"
# Enough for hundreds of engines; the time to parse nested keys grows with the square of their number.
_BYTES_MAX = 16 * 2**10


class EngineConfig(Spec):
    """One engine's table."""

    python: PathText = Field(description="interpreter of the engine's environment")


class Config(Spec):
    """What an evalq.toml may hold."""

    engines: dict[Name, EngineConfig] = Field(default_factory=dict)
    trusted: list[PathText] = Field(
        default_factory=list, description="folders whose evalq.toml may be used; only in the user's own file"
    )


def user_config() -> Path:
    """The user's own evalq.toml, which need not exist."""
    return platformdirs.user_config_path("evalq") / NAME


def python_for(spec: ModelSpec, engine: str) -> str | None:
    """The interpreter a model runs under, None for this one.

    Raises:
        SpecError: as engine_python(), or the spec's own interpreter does not exist.
    """
    if spec.python is None:
        return engine_python(engine)
    return _existing(spec.local(spec.python), f"{spec.where}.python")


def engine_python(engine: str) -> str | None:
    """The interpreter that an engine has by configuration, None for this one.

    Raises:
        SpecError: it does not exist, a file is not as described above, or the file that names it was found in
            a folder that is not trusted.
    """
    path = _named_or_nearest()
    if path is not None and (python := _named_in(path, engine)) is not None:
        if ENVIRONMENT_VARIABLE not in os.environ:
            _require_trusted(path, engine)
        return python
    return _named_in(user_config(), engine) if is_file(user_config()) else None


def read_config(path: Path) -> Config:
    """An evalq.toml. Raises SpecError for one that is not as described above."""
    try:
        raw: dict[str, Any] = tomllib.loads(read_text(path, _BYTES_MAX))
    except RecursionError:
        raise SpecError(f"{path}: nested too deep") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of more than 4300 digits
        raise SpecError(f"{path}: not valid TOML: {shown(str(error).split(';')[0], 120)}") from None
    return validated(Config, raw, f"{path}: ")


def _named_or_nearest() -> Path | None:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path = resolve_path(named, Path.cwd())
        if not is_file(path):
            raise SpecError(f"{path}: no such file", f"--config or ${ENVIRONMENT_VARIABLE} names it")
        return path
    here = Path.cwd()
    return next((folder / NAME for folder in (here, *here.parents) if is_file(folder / NAME)), None)


def _named_in(path: Path, engine: str) -> str | None:
    table = read_config(path).engines.get(engine)
    if table is None:
        return None
    return _existing(resolve_path(table.python, path.parent), f"{path}: engines.{engine}.python")


def _existing(python: Path, where: str) -> str:
    if not is_file(python):
        raise SpecError(
            f"{where}: {python} does not exist", "name the interpreter of the engine's environment"
        )
    return str(python)


def _require_trusted(path: Path, engine: str) -> None:
    """Raise SpecError unless a file that was found may name a program."""
    folder = path.resolve().parent
    if folder in _trusted_folders():
        return
    what = f"{path} names an interpreter for {engine}"
    if folder not in _own_folders():
        remedy = f'to run it: --config {path}, or trusted = ["{folder}"] in {user_config()}'
        raise SpecError(f"{what}, and this folder is not trusted", remedy)
    if _others_can_write(path):
        raise SpecError(f"{what}, and others can write that file", f"chmod go-w {path}")


def _trusted_folders() -> set[Path]:
    own = user_config()
    if not is_file(own):
        return set()
    return {resolve_path(name, own.parent).resolve() for name in read_config(own).trusted}


def _own_folders() -> set[Path]:
    """Where this evalq runs from: what lies there is code that the user runs already."""
    folders = {Path(evalq.__file__).resolve().parents[1]}
    if sys.prefix != sys.base_prefix:
        folders.add(Path(sys.prefix).resolve().parent)
    return folders


def _others_can_write(path: Path) -> bool:
    found = path.stat()
    if not hasattr(os, "getuid"):
        return False
    private_group = found.st_gid == found.st_uid  # each user's own group, which a umask of 002 relies on
    writable = stat.S_IWOTH if private_group else stat.S_IWOTH | stat.S_IWGRP
    return found.st_uid not in (os.getuid(), 0) or bool(found.st_mode & writable)
