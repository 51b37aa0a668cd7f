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

from evalq.cli.help import HelpFormatter
from evalq.version import __version__

DESCRIPTION = """\
Which quantized version of a language model keeps the most quality per bit and per GiB?

Every model reads the same text. Perplexity says how well it predicts it, lower is better; bits per weight and
GiB say what that costs. Models are folders, GGUF files, names on the hub, or specs (JSON)."""

EXAMPLES = """\
examples:
  evalq compare -d sample.json -m bf16/ int4/ Q4_K_M.gguf -p    three versions: table and chart
  evalq inspect owner/name                                      is this checkpoint what it says
  evalq backends                                                which engines are here, how to get the others

evalq COMMAND --help says more."""

# Name: what `evalq --help` says of it, its module.
COMMANDS = {
    "compare": ("score models on texts; table and chart", "evalq.cli.compare"),
    "results": ("show the results that are stored", "evalq.cli.results"),
    "tokens": ("where a model differs most from the reference, token by token", "evalq.cli.tokens"),
    "inspect": ("look into a checkpoint: format, bits, what is wrong with it", "evalq.cli.inspect"),
    "plan": ("will a model fit on a GPU with vLLM", "evalq.cli.plan"),
    "memory": ("read from vLLM's logs where the memory went", "evalq.cli.memory"),
    "dequantize": ("write packed weights as plain ones", "evalq.cli.dequantize"),
    "merge-lora": ("merge a LoRA adapter into its base", "evalq.cli.merge_lora"),
    "backends": ("list engines: what is installed, what to install, their options", "evalq.cli.backends"),
    "env": ("show GPU, driver, CPU, RAM and versions, for a bug report", "evalq.cli.env"),
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
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
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
    if not given:
        parser.print_help()
        return 2
    return _run(parser.parse_args(given))


def compare_main(argv: Sequence[str] | None = None) -> int:
    """`compare.py`: the same as `evalq compare`."""
    command = importlib.import_module(COMMANDS["compare"][1])
    parser = _Parser(prog="compare.py")
    _declare(parser, command)
    return _run(parser.parse_args(argv))


def _declare(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    parser.description, parser.epilog = command.DESCRIPTION, command.EXAMPLES
    parser.formatter_class, parser.allow_abbrev = HelpFormatter, False
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
