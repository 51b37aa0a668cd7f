"""Measures evalq against its peers and writes docs/benchmarks.md and docs/results/benchmarks-cpu.json.

    python benchmarks/run.py all --models models/smollm2 --wikitext2 wiki.test.raw
    python benchmarks/run.py speed --repetitions 5
    python benchmarks/run.py --only agree-gptq --only memory-hf
    python benchmarks/run.py divergence-large --large DIR --repetitions 2

DIR holds Q4_K_M.gguf and bf16/ of Qwen2.5-Coder-1.5B-Instruct; benchmarks/gguf_to_hf.py makes the second of
the first.

Results of cases that are not measured this time are kept. Exit code: 0 every target measured now was met,
1 some was not or could not be measured, 2 something is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import agreement
import divergence
import latency
import memory
import speed
import sweep
from document import write_document
from figures import ROOT, Bench, Case, Figure, Results, code_digest
from running import RunFailed

SECTIONS: dict[str, dict[str, Case]] = {
    "agreement": agreement.CASES,
    "speed": speed.CASES,
    "memory": memory.CASES,
    "latency": latency.CASES,
    "sweep": sweep.CASES,
    "divergence": divergence.CASES,
    "divergence-large": divergence.LARGE_CASES,
}
ALL = ("latency", "agreement", "divergence", "memory", "speed")


def _arguments() -> argparse.Namespace:
    cases = [name for section in SECTIONS.values() for name in section]
    parser = argparse.ArgumentParser(
        description="evalq against its peers, side by side", epilog="cases: " + ", ".join(cases)
    )
    parser.add_argument("section", nargs="?", choices=("all", *SECTIONS), default="all")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "models/smollm2", help="as `make demo` makes it"
    )
    parser.add_argument("--large", type=Path, help="a model of 1.5 billion weights, for divergence-large")
    parser.add_argument("--wikitext2", type=Path, help="wiki.test.raw (default: $EVALQ_WIKITEXT2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3, help="of each speed measurement")
    parser.add_argument("--only", action="append", choices=cases, metavar="CASE", help="just this one")
    parser.add_argument("--resume", action="store_true", help="skip what this very code has measured")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the two files")
    return parser.parse_args()


def _chosen(args: argparse.Namespace) -> dict[str, Case]:
    everything = {name: case for section in SECTIONS.values() for name, case in section.items()}
    if args.only:
        return {name: everything[name] for name in args.only}
    sections = ALL if args.section == "all" else (args.section,)
    return {name: case for section in sections for name, case in SECTIONS[section].items()}


def _stop(message: str) -> NoReturn:
    print(f"benchmarks: {message}", file=sys.stderr)
    sys.exit(2)


def _bench(args: argparse.Namespace, work: Path) -> Bench:
    text = args.wikitext2 or os.environ.get("EVALQ_WIKITEXT2")
    if not text or not Path(text).is_file():
        _stop("no wiki.test.raw: give --wikitext2 FILE or set EVALQ_WIKITEXT2")
    if not (args.models / "bf16").is_dir():
        _stop(f"{args.models} has no bf16/: run `make demo` first")
    if args.large and not (args.large / "bf16").is_dir():
        _stop(f"{args.large} has no bf16/: benchmarks/gguf_to_hf.py makes it")
    large = args.large and args.large.resolve()
    return Bench(args.models.resolve(), Path(text).resolve(), args.threads, args.repetitions, work, large)


def _machine(threads: int) -> dict[str, Any]:
    """`evalq env`, with the threads used and the instructions that llama.cpp was built for."""
    found = subprocess.run(
        [sys.executable, "-m", "evalq", "env", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        _stop(f"evalq env failed: {found.stderr.strip()[-500:]}")
    machine: dict[str, Any] = json.loads(found.stdout)
    return machine | {"threads_used": threads, "llama_cpp": ", ".join(agreement.wheel_kernels())}


def _measure(case: Case, bench: Bench) -> tuple[list[Figure], str | None]:
    bench.raw = []
    try:
        return case(bench), None
    except (RunFailed, OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        return [], f"{type(error).__name__}: {error}"


def main() -> int:
    """Measure what was asked for, case by case; every case's results are safe once it is done."""
    args = _arguments()
    code = code_digest()
    results = Results(args.output / "results/benchmarks-cpu.json", _machine(args.threads))
    sections = {name: list(cases) for name, cases in SECTIONS.items()}
    all_met = True
    with tempfile.TemporaryDirectory(prefix="evalq-bench-") as work:
        bench = _bench(args, Path(work))
        for name, case in _chosen(args).items():
            if args.resume and results.is_current(name, code):
                print(f"{name}: measured before", flush=True)
                continue
            began = time.monotonic()
            figures, error = _measure(case, bench)
            results.keep(name, figures, bench, code, error)
            write_document(args.output / "benchmarks.md", results.machine, results.cases, sections)
            print(f"{name}: {time.monotonic() - began:.0f} s" + (f": {error}" if error else ""), flush=True)
            for figure in figures:
                verdict = {True: "met", False: "NOT MET", None: ""}[figure.met]
                peer = f", {figure.peer}" if figure.peer else ""
                print(f"  {figure.what}: {figure.evalq}{peer}: {figure.value} {verdict}", flush=True)
            all_met &= error is None and all(figure.met is not False for figure in figures)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
