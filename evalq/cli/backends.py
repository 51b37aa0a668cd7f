"""`evalq backends`: which engines there are, and what each needs."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from evalq.cli.config import add_config

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Engines: the versions that are installed, or the command that installs them. The names in the first two
columns are what a model spec says as "load_fn"; with -v, the options that each understands."""

EXAMPLES = """\
examples:
  evalq backends                                what is installed
  evalq backends -v                             what may stand under "options" in a model spec"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("-v", "--verbose", action="store_true", help="their options too")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Every engine: what is installed, or what to install. Exit code 0."""
    from evalq.engine.registry import ALIASES, backend_names
    from evalq.errors import ModelError
    from evalq.show.columns import MINOR, Column, print_columns
    from evalq.show.console import output

    console = output()
    engines = []
    for name in sorted(backend_names()):
        also = ", ".join(alias for alias, target in ALIASES.items() if target.backend == name)
        engines.append((name, also, *_state(name)))
    columns = [
        Column[tuple[str, ...]]("load_fn", lambda row: row[0]),
        Column[tuple[str, ...]]("also", lambda row: row[1], MINOR, folds=True),
        Column[tuple[str, ...]]("engine", lambda row: row[2], folds=True, style=lambda row: row[3]),
    ]
    print_columns(engines, columns, console)
    if arguments.verbose:
        for name in sorted(backend_names()):
            with contextlib.suppress(ModelError):
                _print_options(name, console)
    return 0


def _state(name: str) -> tuple[str, str]:
    """What is installed or what to do, and the style to show it in."""
    from evalq.engine.interpreters import versions
    from evalq.engine.registry import backend
    from evalq.errors import EvalqError
    from evalq.spec.config import engine_python

    try:
        found, install = versions(name, engine_python(name)), backend(name).install
    except EvalqError as error:
        return str(error), "red"
    if not found:
        return f"not installed: {install}", "yellow"
    return ", ".join(f"{dist} {version}" for dist, version in found.items()), ""


def _print_options(name: str, console: "Console") -> None:
    from evalq.engine.registry import backend
    from evalq.show.columns import MAJOR, Column, print_columns
    from evalq.show.console import say

    options = [
        (key, " | ".join(kind.__name__ for kind in option.kind), option.help)
        for key, option in backend(name).options.items()
    ]
    console.print()
    say(console, (f"options of {name}" if options else f"{name} has no options", "dim"))
    columns = [
        Column[tuple[str, ...]]("option", lambda row: row[0]),
        Column[tuple[str, ...]]("type", lambda row: row[1], MAJOR),
        Column[tuple[str, ...]]("meaning", lambda row: row[2], folds=True),
    ]
    if options:
        console.print()
        print_columns(options, columns, console)
