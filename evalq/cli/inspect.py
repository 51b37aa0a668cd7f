"""`evalq inspect`: what is in a checkpoint, and is it what it says."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from evalq.cli.config import add_config

if TYPE_CHECKING:
    from evalq.inspect import Inspection

DESCRIPTION = """\
What is in a checkpoint, from the headers of its files: architecture, format, bits per weight of every kind
of layer, what is left unquantized, which engines can run it on this machine, whether a LoRA adapter can go on
it, and whether the files are what they say. No weights are loaded, and none downloaded from the hub."""

EXAMPLES = """\
examples:
  evalq inspect models/llama-int4                       a checkpoint directory
  evalq inspect Q4_K_M.gguf --plot                      a GGUF file; where the bytes are, in plots/out/
  evalq inspect turboderp/Llama-3.1-8B-Instruct-exl3 --revision 4.0bpw
      a model on the hub, without its weights
  evalq inspect models/mine --deep --json               the values of the scales too, for a script

exit code: 0 sound (warnings included), 1 a finding says it is broken, 2 no model there or a damaged file"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory, GGUF file, or owner/name, owner/name/file.gguf on the hub"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--deep", action="store_true", help="look for zeros and NaN in the values of scales too"
    )
    parser.add_argument("--per-tensor", action="store_true", help="every weight: format, bits and bytes")
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    parser.add_argument(
        "--plot", nargs="?", const="", metavar="FILE",
        help="draw where the bytes are: png, svg or pdf (default: in plots/out/); after MODEL",
    )  # fmt: skip
    parser.add_argument("--dark", action="store_true", help="the picture light on dark")
    add_config(parser)
    parser.add_argument("--offline", action="store_true", help="never use the network")


def run(arguments: argparse.Namespace) -> int:
    """Inspect, print, draw. Exit code 0, or 1 when a finding is an error. Raises EvalqError."""
    import sys

    from evalq.inspect import inspect_checkpoint, open_model
    from evalq.show.console import output
    from evalq.show.inspection import as_json, print_inspection

    checkpoint = open_model(arguments.model, arguments.revision, arguments.offline)
    found = inspect_checkpoint(checkpoint, arguments.deep)
    if arguments.json:
        sys.stdout.write(as_json(found, arguments.per_tensor))
    else:
        print_inspection(found, output(), arguments.per_tensor)
    if arguments.plot is not None:
        path = Path(arguments.plot) if arguments.plot else _default_file(arguments)
        _plot(found, path, arguments.dark)
    return 1 if any(finding.severity == "error" for finding in found.findings) else 0


def _default_file(arguments: argparse.Namespace) -> Path:
    """plots/out/inspect-NAME.png."""
    import re

    last = arguments.model.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.")[-60:] or "model"
    return Path("plots") / "out" / f"inspect-{slug}{'-dark' if arguments.dark else ''}.png"


def _plot(found: "Inspection", path: Path, dark: bool) -> None:
    """Draw, and say where the picture is on standard error."""
    from rich.console import Console

    from evalq.errors import SpecError
    from evalq.show.console import say

    try:
        from evalq.plots import inspect as chart
    except ImportError as error:
        raise SpecError(f"cannot draw: {error}", 'pip install "evalq[plot]"') from None
    chart.save(chart.draw(found, dark), path)
    say(Console(stderr=True), f"picture: {path}")
