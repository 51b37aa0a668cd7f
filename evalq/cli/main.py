"""The command line. Everything heavy is imported by the command that needs it, so that --help is instant."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from evalq.cli.numbers import count, positive
from evalq.version import __version__

COMPARE_DESCRIPTION = """\
Score quantized models on one text and compare perplexity per bit.

Each model runs in a process of its own; one that fails is reported and the others go on. Results are kept:
the same command again shows them at once, and a run that was interrupted continues where it was."""

COMPARE_EXAMPLES = """\
examples:
  compare.py -d sample.json -m bf16.json int4.json -p        a first comparison, without WikiText-2
  compare.py -d wiki2.json -m nvfp4.json exl3.json -p        WikiText-2, chart in plots/out/
  compare.py -d wiki2.json -m my/*.json --markdown           your own models, as a table for a README
  compare.py -d wiki2.json -m gguf.json --protocol llama.cpp the windows of llama-perplexity
  compare.py -d wiki2.json -m exl3.json -p -v -dark          GiB instead of bits per weight, dark

A spec without a path that is not in this folder is looked up among the shipped ones (evalq/specs).
exit code: 0 all scored, 1 some model failed, 2 bad usage or spec, 130 interrupted"""


# Commands with a module of their own: DESCRIPTION, add_arguments, run, and EXAMPLES where there are some.
COMMAND_MODULES = {
    "inspect": ("what is inside a checkpoint", "evalq.cli.inspect"),
    "plan": ("will it fit on a GPU with vLLM", "evalq.cli.plan"),
    "memory": ("what vLLM's logs say about memory", "evalq.cli.memory"),
    "dequantize": ("plain weights out of packed ones", "evalq.cli.dequantize"),
    "merge-lora": ("an adapter merged into its base", "evalq.cli.merge_lora"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `evalq` command."""
    parser = argparse.ArgumentParser(
        prog="evalq",
        description="Which quantized version of a model keeps the most quality per bit and per GiB?",
        formatter_class=RawDescriptionRichHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"evalq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("compare", "score models on one text, table and chart"),
        ("results", "what the store holds"),
        ("backends", "engines: installed versions, or what to install; their options"),
        ("env", "GPU, driver, CPU, RAM and versions, as kept in every record"),
    ):
        description = COMPARE_DESCRIPTION if name == "compare" else text[0].upper() + text[1:] + "."
        sub = commands.add_parser(
            name,
            help=text,
            description=description,
            epilog=COMPARE_EXAMPLES if name == "compare" else None,
            formatter_class=RawDescriptionRichHelpFormatter,
            allow_abbrev=False,
        )
        _ADD_ARGUMENTS[name](sub)
    given = list(sys.argv[1:] if argv is None else argv)
    for name, (text, module_name) in COMMAND_MODULES.items():
        if name not in given[:1]:
            commands.add_parser(name, help=text)  # listed; its module is imported when it is asked for
            continue
        module = importlib.import_module(module_name)
        sub = commands.add_parser(
            name,
            help=text,
            description=module.DESCRIPTION,
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=RawDescriptionRichHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return _dispatch(parser.parse_args(given))


def compare_main(argv: Sequence[str] | None = None) -> int:
    """`compare.py`: the same as `evalq compare`."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=COMPARE_DESCRIPTION,
        epilog=COMPARE_EXAMPLES,
        formatter_class=RawDescriptionRichHelpFormatter,
        allow_abbrev=False,
    )
    _compare_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.command = "compare"
    return _dispatch(arguments)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to score")
    what.add_argument(
        "-d", "--dataspec", required=True, metavar="SPEC", help="data spec (JSON): text, protocol"
    )
    what.add_argument(
        "-m",
        "--modelspec",
        required=True,
        nargs="+",
        metavar="SPEC",
        help="model specs (JSON), wildcards too",
    )
    what.add_argument("-mask", "--mask", metavar='"A;B"', help="only models whose label holds one of these")
    what.add_argument("--protocol", metavar="NAME", help="instead of the data spec's, with its own stride")
    what.add_argument("--max-rows", type=count, metavar="N", help="at most N windows, for a quick look")
    plot = parser.add_argument_group("chart")
    plot.add_argument("-p", "--plot", action="store_true", help="draw bits per weight against perplexity")
    plot.add_argument(
        "-o", "--plot-file", type=Path, metavar="FILE", help="png, svg or pdf (default: in plots/out/)"
    )
    plot.add_argument("-t", "--title", metavar="TEXT", help="title of the chart")
    plot.add_argument(
        "-v", "--vram", action="store_true", help="x is GiB of layers and head, not bits per weight"
    )
    plot.add_argument("-mx", "--max_x", type=float, metavar="X", help="leave out points right of X")
    plot.add_argument("-my", "--max_y", type=float, metavar="Y", help="leave out points above Y")
    plot.add_argument("-dark", "--dark", action="store_true", help="light on dark")
    plot.add_argument("--show", action="store_true", help="open a window as well, where there is a display")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="the records as a list; - for standard output")
    out.add_argument("--csv", metavar="FILE", help="one line per model; - for standard output")
    out.add_argument(
        "--markdown", nargs="?", const="-", metavar="FILE", help="a table for a README (default: -)"
    )
    out.add_argument("--memory", action="store_true", help="a second table: where each model's memory went")
    out.add_argument(
        "-q", "--quiet", action="store_true", help="no progress, no table; failures on standard error"
    )
    how = parser.add_argument_group("how to run")
    _store_argument(how)
    how.add_argument(
        "-cc", "--clear_cache", action="store_true", help="score the named models on this data anew"
    )
    how.add_argument("--timeout", type=positive, metavar="S", help="give a model up after S seconds")
    how.add_argument(
        "--try-anyway", action="store_true", help="start engines that are predicted to run out of memory too"
    )
    how.add_argument("--offline", action="store_true", help="never use the network")


def _store_argument(parser: argparse._ActionsContainer) -> None:
    text = "folder of results (default: $EVALQ_STORE, else the user's data folder)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=text)


def _results_arguments(parser: argparse.ArgumentParser) -> None:
    _store_argument(parser)
    parser.add_argument("--json", action="store_true", help="the records as a list")


def _backends_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="their options too")


def _env_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


_ADD_ARGUMENTS = {
    "compare": _compare_arguments,
    "results": _results_arguments,
    "backends": _backends_arguments,
    "env": _env_arguments,
}


def _dispatch(arguments: argparse.Namespace) -> int:
    from evalq.cli import commands
    from evalq.errors import EvalqError

    try:
        run = {
            "compare": commands.compare,
            "results": commands.results,
            "backends": commands.backends,
            "env": commands.env,
        }.get(arguments.command)
        return int((run or arguments.run)(arguments))
    except EvalqError as error:
        print(f"evalq: {error}", file=sys.stderr)
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
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run() -> NoReturn:
    """Entry of `python -m evalq`."""
    sys.exit(main())
