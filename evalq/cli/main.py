"""The command line. Everything heavy is imported by the command that needs it, so that --help is instant.

A command is a module with DESCRIPTION, EXAMPLES, add_arguments(parser) and run(arguments) -> exit code.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from evalq.version import __version__

# Name: what `evalq --help` says of it, its module.
COMMANDS = {
    "compare": ("score models on one text, table and chart", "evalq.cli.compare"),
    "results": ("what the store holds", "evalq.cli.results"),
    "inspect": ("what is inside a checkpoint", "evalq.cli.inspect"),
    "plan": ("will it fit on a GPU with vLLM", "evalq.cli.plan"),
    "memory": ("what vLLM's logs say about memory", "evalq.cli.memory"),
    "dequantize": ("plain weights out of packed ones", "evalq.cli.dequantize"),
    "merge-lora": ("an adapter merged into its base", "evalq.cli.merge_lora"),
    "backends": ("engines: installed versions, or what to install; their options", "evalq.cli.backends"),
    "env": ("GPU, driver, CPU, RAM and versions, as kept in every record", "evalq.cli.env"),
}


class _Parser(argparse.ArgumentParser):
    """Shows what a shell's wildcard put on the command line without obeying it."""

    def error(self, message: str) -> NoReturn:
        from evalq.show.plain import plain

        super().error(plain(message))


def main(argv: Sequence[str] | None = None) -> int:
    """The `evalq` command."""
    parser = _Parser(
        prog="evalq",
        description="Which quantized version of a model keeps the most quality per bit and per GiB?",
        formatter_class=RawDescriptionRichHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"evalq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if argv is None else argv)
    for name, (text, module_name) in COMMANDS.items():
        if name in given[:1]:
            command = importlib.import_module(module_name)
            _declare(commands.add_parser(name, help=text), command)
        else:
            commands.add_parser(name, help=text)  # listed; its module is imported when it is asked for
    return _run(parser.parse_args(given))


def compare_main(argv: Sequence[str] | None = None) -> int:
    """`compare.py`: the same as `evalq compare`."""
    command = importlib.import_module(COMMANDS["compare"][1])
    parser = _Parser(prog="compare.py")
    _declare(parser, command)
    return _run(parser.parse_args(argv))


def _declare(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    parser.description, parser.epilog = command.DESCRIPTION, command.EXAMPLES
    parser.formatter_class, parser.allow_abbrev = RawDescriptionRichHelpFormatter, False
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _run(arguments: argparse.Namespace) -> int:
    from evalq.errors import EvalqError
    from evalq.show.plain import plain

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows "→" as its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(arguments.run(arguments))
    except EvalqError as error:
        print(f"evalq: {plain(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "evalq: interrupted; what was scored is kept, the same command continues there", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        return _closed_pipe()


def _closed_pipe() -> int:
    """Standard output was closed, as by `| head`; keep Python from complaining about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run() -> NoReturn:
    """Entry of `python -m evalq`."""
    sys.exit(main())
