r"""Speed of generating: evalq's --speed beside the engine's own benchmark, taking turns in one run.

    python benchmarks/generation_speed.py gguf models/smollm2/Q8_0.gguf --threads 2
    python benchmarks/generation_speed.py vllm models/smollm2/bf16 --python .venv-vllm/bin/python \
        --batch 1 --batch 32

llama-bench (benchmarks/peers/build_llama_perplexity.sh makes it) gives tokens per second of a prompt, from
which follows the time to the first token, and of new tokens after that prompt. `vllm bench latency` gives the
seconds of whole requests; it runs with one new token and with all of them, and the difference is that of the
new tokens after the first. Every run is a process of its own with a warm-up; both sides get the same lengths,
threads and batches.

Prints a Markdown table: medians, their ratio, and the ratio's lowest and highest of one turn. Exit code 0
when every ratio is within 10 %, 1 when not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evalq.data.tokens import write_stream
from evalq.results.speed import Part, SpeedSettings
from evalq.run.job import SpeedJob
from evalq.run.process import Event, WorkerSettings, run_worker

ROOT = Path(__file__).resolve().parents[1]
LLAMA_BENCH = ROOT / ".work/llama.cpp/build/bin/llama-bench"
WITHIN = 0.1
SECONDS_MAX = 3600.0
# `vllm bench latency`: vLLM's own command looks for a distribution of that name, and the CPU's has another.
_LATENCY = """
from vllm.benchmarks import latency
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser
except ImportError:
    from vllm.utils import FlexibleArgumentParser as Parser
if __name__ == "__main__":
    parser = Parser()
    latency.add_cli_args(parser)
    latency.main(parser.parse_args())
"""
Figures = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """What both sides do."""

    prompt: int
    new: int
    batch: int
    threads: int

    @property
    def part(self) -> Part:
        """What evalq calls it."""
        return "one" if self.batch == 1 else "batch"


def evalq(engine: str, model: Path, python: str | None, options: dict[str, Any], sizes: Sizes) -> Figures:
    """One turn of evalq: a worker that loads the model, warms up and measures once."""
    found: Figures = {}

    def told(event: Event) -> None:
        if event["event"] == "speed":
            found[event["figure"]] = float(event["values"][0])
        elif event["event"] == "not_measured":
            raise SystemExit(f"evalq: {event['message']}")

    settings = SpeedSettings(
        prompt_tokens=sizes.prompt, new_tokens=sizes.new, batch=sizes.batch, windows=1, repeats=1
    )
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        ids = np.random.default_rng(0).integers(1000, 10_000, sizes.prompt * (2 * sizes.batch + 2))
        facts = {"n_tokens": len(ids), "bos_id": None, "eos_id": None, "adds_bos": False, "document_ends": ()}
        described = {"facts": facts, "probe_text": "", "probe_ids": (), "prefix_ids": ()}
        write_stream(tokens, ids, described)
        job = SpeedJob(
            load=engine,
            forward=engine,
            load_fn=engine,
            path=str(model),
            options=options,
            trust_remote_code=False,
            tokens_file=str(tokens),
            parts=(sizes.part,),
            settings=settings,
        )
        run_worker(job, WorkerSettings(python, SECONDS_MAX, True, Path(folder) / "worker.log"), told)
    return {name.removesuffix("_batch"): value for name, value in found.items()}


def llama_bench(model: Path, sizes: Sizes) -> Figures:
    """One turn of llama-bench, with the batches and the attention that evalq takes."""
    if not LLAMA_BENCH.is_file():
        raise SystemExit(f"{LLAMA_BENCH} does not exist: bash benchmarks/peers/build_llama_perplexity.sh")
    argv = [LLAMA_BENCH, "-m", model, "-t", sizes.threads, "-b", 2048, "-ub", 512, "-fa", "on", "-r", 1]
    (prompt,) = json.loads(_run([*argv, "-p", sizes.prompt, "-n", 0, "-o", "json"], {}))
    (new,) = json.loads(_run([*argv, "-p", 0, "-n", sizes.new, "-d", sizes.prompt, "-o", "json"], {}))
    return {"first_token_seconds": sizes.prompt / prompt["avg_ts"], "generation": float(new["avg_ts"])}


def vllm_bench(model: Path, python: str, more: list[str], sizes: Sizes) -> Figures:
    """One turn of `vllm bench latency`, with one new token and with all of them."""
    seconds = {}
    # As evalq starts it: the engine in the process itself.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if sizes.threads:
        environment["OMP_NUM_THREADS"] = str(sizes.threads)
    for new in (1, sizes.new):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "latency.json"
            argv: list[object] = [python, "-c", _LATENCY]
            argv += ["--model", model, "--input-len", sizes.prompt, "--output-len", new]
            argv += ["--batch-size", sizes.batch, "--max-num-seqs", sizes.batch]
            argv += ["--max-model-len", sizes.prompt + sizes.new, "--num-iters-warmup", 1, "--num-iters", 1]
            _run([*argv, "--output-json", out, *more], environment)
            seconds[new] = float(json.loads(out.read_text())["avg_latency"])
    return {
        "first_token_seconds": seconds[1],
        "generation": sizes.batch * (sizes.new - 1) / (seconds[sizes.new] - seconds[1]),
    }


def _run(argv: list[Any], environment: dict[str, str]) -> str:
    command = [str(part) for part in argv]
    ran = subprocess.run(command, env=dict(os.environ, **environment), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return ran.stdout


def take_turns(ours: Callable[[], Figures], theirs: Callable[[], Figures], turns: int) -> list[Figures]:
    """Both, then both the other way round, so that a slow minute hits both alike; a turn's figures in one."""
    found = []
    for turn in range(turns):
        if turn % 2 == 0:
            one, other = ours(), theirs()
        else:
            other, one = theirs(), ours()
        found.append(one | {f"peer {name}": value for name, value in other.items()})
        print(f"turn {turn + 1} of {turns}: {found[-1]}", file=sys.stderr, flush=True)
    return found


def rows_of(what: str, sizes: Sizes, turns: list[Figures]) -> tuple[list[str], bool]:
    """Rows of the table, and whether every ratio is within 10 %."""
    rows, met = [], True
    for figure, words, digits, scale in (
        ("generation", "new tokens per second", 1, 1.0),
        ("first_token_seconds", "ms to the first token", 0, 1000.0),
    ):
        if any(figure not in turn for turn in turns):
            continue
        ours, theirs = ([scale * turn[prefix + figure] for turn in turns] for prefix in ("", "peer "))
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ours) / statistics.median(theirs)
        met &= abs(ratio - 1) <= WITHIN
        cells = [
            f"{what}, batch {sizes.batch}, {sizes.prompt} + {sizes.new}",
            words,
            f"{statistics.median(ours):.{digits}f}",
            f"{statistics.median(theirs):.{digits}f}",
            f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(turns)} turns)",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows, met


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="evalq's --speed beside llama-bench or vllm bench latency")
    parser.add_argument("engine", choices=("gguf", "vllm"))
    parser.add_argument("model", type=Path, help="a GGUF file, or a checkpoint folder")
    parser.add_argument("--python", help="of the environment with vLLM (default: this one)")
    parser.add_argument(
        "--batch", type=int, action="append", help="prompts at once (default 1), again for more"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of both (default: the engine's)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs on both sides")
    parser.add_argument("--dtype", help="of vLLM on both sides")
    return parser.parse_args()


def main() -> int:
    """Measure, print the table."""
    args = _arguments()
    threads = args.threads or (len(os.sched_getaffinity(0)) if args.engine == "gguf" else 0)
    options: dict[str, Any] = {"threads": threads} if threads else {}
    more: list[str] = []
    if args.engine == "vllm":
        options |= ({"dtype": args.dtype} if args.dtype else {}) | (
            {"enforce_eager": True} if args.eager else {}
        )
        more = (["--dtype", args.dtype] if args.dtype else []) + (["--enforce-eager"] if args.eager else [])
    python, model, all_met = args.python or sys.executable, args.model.resolve(), True
    name = "llama-bench" if args.engine == "gguf" else "vllm bench latency"
    print(
        f"| what | figure | evalq | {name} | ratio (lowest to highest of one turn) |\n|---|---|---:|---:|---|"
    )
    for batch in args.batch or [1]:
        sizes = Sizes(args.prompt, args.new, batch, threads)
        if args.engine == "gguf" and batch != 1:
            raise SystemExit("llama-bench runs one prompt at a time: leave --batch out")

        def ours(sizes: Sizes = sizes) -> Figures:
            return evalq(args.engine, model, args.python, options, sizes)

        def theirs(sizes: Sizes = sizes) -> Figures:
            if args.engine == "gguf":
                return llama_bench(model, sizes)
            return vllm_bench(model, python, more, sizes)

        rows, met = rows_of(f"`{args.engine}` {model.name}", sizes, take_turns(ours, theirs, args.turns))
        print("\n".join(rows), flush=True)
        all_met &= met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
