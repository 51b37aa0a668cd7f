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
    """The machine and its software."""
    import json
    import sys

    from rich.table import Table

    from evalq.errors import EvalqError
    from evalq.interpreters import versions
    from evalq.machine import environment
    from evalq.registry import backend_names
    from evalq.show.console import output
    from evalq.spec.config import engine_python

    engines = {}
    for name in sorted(backend_names()):
        try:
            engines[name] = versions(name, engine_python(name))
        except EvalqError as error:
            print(f"evalq: {name}: {error}", file=sys.stderr)
    found = environment() | {"engines": engines}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    shown = Table(show_header=False, box=None)
    for key, value in found.items():
        if key == "gpus":
            value = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in value) or "none visible"
        if key == "engines":
            value = "\n".join(
                f"{n}: " + ", ".join(f"{d} {v}" for d, v in e.items()) for n, e in value.items() if e
            )
        shown.add_row(key, str(value if value is not None else "–"))
    output().print(shown)
    return 0
