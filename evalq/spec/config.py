"""evalq.toml: where each engine's own environment is.

Engines pin conflicting versions of torch, so each may live in an environment of its own:

    [engines.vllm]
    python = ".venv-vllm/bin/python"     # relative to evalq.toml; ~ and $VARS are expanded

The file is looked for in the current folder and above it. A model spec's "python" goes first.
"""

import tomllib
from functools import cache
from pathlib import Path

from evalq.errors import SpecError
from evalq.spec import ModelSpec, nearest, resolve_path

NAME = "evalq.toml"


@cache
def find(start: Path) -> Path | None:
    """The nearest evalq.toml at or above `start`."""
    return next((folder / NAME for folder in (start, *start.parents) if (folder / NAME).is_file()), None)


@cache
def engine_pythons(path: Path) -> dict[str, str]:
    """Backend name -> interpreter. Raises SpecError for a file that is not as described above."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    for key in raw:
        if key != "engines":
            raise SpecError(f"{path}: {key}: unknown table", nearest(key, ["engines"]))
    pythons = {}
    for engine, table in raw.get("engines", {}).items():
        unknown = [key for key in table if key != "python"] if isinstance(table, dict) else [str(table)]
        if unknown or not isinstance(table.get("python"), str):
            raise SpecError(f'{path}: engines.{engine}: should hold python = "..." and nothing else')
        pythons[engine] = str(resolve_path(table["python"], path.parent))
    return pythons


def python_for(spec: ModelSpec, engine: str) -> str | None:
    """The interpreter a model runs under, None for this one. Raises SpecError if it does not exist."""
    toml = find(Path.cwd())
    if spec.python is not None:
        python, where = str(spec.local(spec.python)), f"{spec.where}.python"
    elif toml is not None and engine in engine_pythons(toml):
        python, where = engine_pythons(toml)[engine], f"{toml}: engines.{engine}.python"
    else:
        return None
    if not Path(python).is_file():
        raise SpecError(
            f"{where}: {python} does not exist", "name the interpreter of the engine's environment"
        )
    return python
