"""`evalq backends`: which engines there are, and what each needs."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from evalq.cli.config import add_config

if TYPE_CHECKING:
    from rich.table import Table

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
    """Every engine: what is installed, or what to install."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from evalq.errors import ModelError
    from evalq.registry import ALIASES, backend_names
    from evalq.show.console import output

    shown = Table("load_fn", "also", "engine", title_justify="left", box=SIMPLE_HEAD)
    for name in sorted(backend_names()):
        aliases = ", ".join(alias for alias, target in ALIASES.items() if target.backend == name)
        shown.add_row(name, aliases, _engine_state(name))
    console = output()
    console.print(shown)
    if arguments.verbose:
        for name in sorted(backend_names()):
            with contextlib.suppress(ModelError):
                console.print(_options_table(name))
    return 0


def _engine_state(name: str) -> str:
    from rich.markup import escape

    from evalq.errors import EvalqError
    from evalq.interpreters import versions
    from evalq.registry import backend
    from evalq.spec.config import engine_python

    try:
        found, install = versions(name, engine_python(name)), backend(name).INSTALL
    except EvalqError as error:
        return f"[red]{escape(str(error))}[/]"
    if not found:
        return f"[yellow]not installed:[/] {escape(install)}"
    return ", ".join(f"{dist} {version}" for dist, version in found.items())


def _options_table(name: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from evalq.registry import backend

    options = Table(
        "option", "type", "meaning", title=f"options of {name}", title_justify="left", box=SIMPLE_HEAD
    )
    for key, option in backend(name).OPTIONS.items():
        options.add_row(key, escape(" | ".join(kind.__name__ for kind in option.kind)), escape(option.help))
    return options
