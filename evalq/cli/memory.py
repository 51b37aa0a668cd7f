"""`evalq memory LOG...`: what vLLM's logs say about memory."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalq.vllm_memory.engine_run import EngineRun

DESCRIPTION = """\
Read vLLM logs: where the GPU memory went, and why a model did not start.

Every start of an engine becomes a row: weights, peak activation, non-torch memory, CUDA graphs and KV cache,
in GiB per GPU (the largest of the ranks). Under the table stand the details, the --kv-cache-memory that fits,
and for a failure its cause, the figures in its message and what to do. vLLM 0.8 to 0.33, CUDA or CPU."""

EXAMPLES = """\
examples:
  evalq memory vllm.log                         one log, with any number of starts
  evalq memory logs/*.log --plot                several, and a picture in plots/out/
  vllm serve MODEL 2>&1 | tee vllm.log          vLLM logs to standard error: keep both
  kubectl logs vllm-0 | evalq memory -          standard input
  evalq memory vllm.log --json | jq '.[0].kv_cache_gib'

From vLLM 0.11 to 0.25 the parts are logged at DEBUG only: start it with VLLM_LOGGING_LEVEL=DEBUG to see them.
exit code: 0 every engine started, 1 some did not, 2 not a log"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="what vLLM printed; - for standard input")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--markdown", action="store_true", help="the table for a README")
    shown.add_argument("--csv", action="store_true", help="one line per run, raw numbers")
    shown.add_argument("--json", action="store_true", help="a list of runs with everything found")
    chart = parser.add_argument_group("picture")
    chart.add_argument("--plot", action="store_true", help="draw the parts of each run as stacked bars")
    chart.add_argument(
        "-o", "--plot-file", type=Path, metavar="FILE", help="png, svg or pdf (default: plots/out/memory.png)"
    )
    chart.add_argument("-t", "--title", metavar="TEXT", help="title of the picture")
    chart.add_argument("-dark", "--dark", action="store_true", help="light on dark")


def run(arguments: argparse.Namespace) -> int:
    """Print, draw. Exit code 0, or 1 when an engine did not start."""
    import sys

    from rich.console import Console

    from evalq.vllm_memory import run_output
    from evalq.vllm_memory.reader import read_logs

    runs = read_logs(arguments.logs)
    if arguments.json:
        sys.stdout.write(run_output.as_json(runs))
    elif arguments.csv:
        sys.stdout.write(run_output.as_csv(runs))
    elif arguments.markdown:
        sys.stdout.write(run_output.markdown(runs))
    else:
        run_output.print_runs(runs, Console())
    if arguments.plot or arguments.plot_file:
        _plot(arguments, runs)
    return 0 if all(run.status == "success" for run in runs) else 1


def _plot(arguments: argparse.Namespace, runs: "list[EngineRun]") -> None:

    from rich.console import Console

    from evalq.errors import SpecError
    from evalq.show.console import say

    try:
        from evalq.plots import memory
        from evalq.plots.output import save
    except ImportError as error:
        raise SpecError(f"cannot draw: {error}", 'pip install "evalq[plot]"') from None
    suffix = "-dark" if arguments.dark else ""
    path = arguments.plot_file or Path("plots") / "out" / f"memory{suffix}.png"
    save(memory.draw(runs, memory.MemoryChart(title=arguments.title, dark=arguments.dark)), path)
    say(Console(stderr=True), f"chart: {path}")
