"""`evalq env`: the machine and its software."""

import argparse

from evalq.cli.config import add_config

DESCRIPTION = "GPU, driver, CPU, RAM and versions, as kept in every record."

EXAMPLES = """\
examples:
  evalq env                                     for a bug report
  evalq env --json                              for a script"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """The machine and its software. Exit code 0."""
    import sys

    from rich.console import Console

    from evalq.engine.interpreters import versions
    from evalq.engine.registry import backend_names
    from evalq.errors import EvalqError
    from evalq.machine import environment
    from evalq.show.columns import Column, print_columns
    from evalq.show.console import output, say
    from evalq.show.plain import json_text
    from evalq.spec.config import engine_python

    engines = {}
    for name in sorted(backend_names()):
        try:
            engines[name] = versions(name, engine_python(name))
        except EvalqError as error:
            say(Console(stderr=True), f"evalq: {name}: {error}")
    found = environment()
    if arguments.json:
        sys.stdout.write(json_text(found | {"engines": engines}))
        return 0
    rows = [(key, _text(key, value)) for key, value in found.items()]
    for name, packages in engines.items():
        if packages:
            rows.append((name, ", ".join(f"{package} {version}" for package, version in packages.items())))
    columns = [
        Column[tuple[str, str]]("", lambda row: row[0], style=lambda row: "bold"),
        Column[tuple[str, str]]("", lambda row: row[1], folds=True),
    ]
    print_columns(rows, columns, output(), header=False)
    return 0


def _text(key: str, value: object) -> str:
    """A fact in words."""
    if key == "gpus" and isinstance(value, list):
        return ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in value) or "none visible"
    return "–" if value is None else str(value)
