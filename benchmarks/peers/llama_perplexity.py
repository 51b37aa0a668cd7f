"""Runs llama-perplexity and prints what it says as one JSON object, for comparison. Knows nothing of evalq.

    python benchmarks/peers/llama_perplexity.py --model models/smollm2/X.gguf --text wiki.test.raw --chunks 4

Keys: ppl (four decimals, as the tool prints it), chunks (scored), chunks_available (with --count: in the
whole text), tokens (scored), tokens_decoded, kernels (instruction sets it was built for), seconds (from its
"calculating perplexity" to its final estimate, by the clock in its own log, so without loading and
tokenization), and peak_rss_gib.
The tool itself: build_llama_perplexity.sh beside this file.
"""

import argparse
import json
import os
import re
import resource
import subprocess
from pathlib import Path

BINARY = Path(__file__).resolve().parents[2] / ".work/llama.cpp/build/bin/llama-perplexity"
# The log's clock: minutes.seconds.milliseconds.microseconds since the start.
_CLOCK = r"(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) I (?:perplexity: )?"
_BEGINS = re.compile(_CLOCK + r"calculating perplexity over (\d+) chunks, n_ctx=(\d+)")
_ENDS = re.compile(_CLOCK + r"Final estimate: PPL = ([\d.]+)")


def _clock_seconds(match: re.Match[str]) -> float:
    minutes, seconds, millis, micros = (int(part) for part in match.groups()[:4])
    return minutes * 60 + seconds + millis / 1e3 + micros / 1e6


def command(args: argparse.Namespace) -> list[str]:
    """The tool's command line, for all chunks."""
    return [
        str(args.binary),
        *("-m", args.model, "-f", str(args.text), "-c", str(args.n_ctx)),
        *("-t", str(args.threads), "-tb", str(args.threads), "--log-timestamps", "--log-prefix"),
    ]


def chunks_available(argv: list[str]) -> int:
    """How many chunks the tool finds in the whole text; it is ended as soon as it has said so."""
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as tool:
        assert tool.stderr is not None
        try:
            for line in tool.stderr:
                if match := _BEGINS.search(line):
                    return int(match.group(5))
        finally:
            tool.kill()
    raise SystemExit("llama-perplexity never began to calculate")


def kernels(log: str) -> list[str]:
    """The instruction sets the tool was built for, as its log names them."""
    line = next((line for line in log.splitlines() if "system_info:" in line), "")
    return re.findall(r"(\w+) = 1", line)


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity by llama-perplexity")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--text", required=True, type=Path, help="wiki.test.raw")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=-1, help="score only the first ones")
    parser.add_argument("--count", action="store_true", help="count the chunks of the whole text as well")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--binary", type=Path, default=BINARY)
    args = parser.parse_args()
    if not args.binary.exists():
        raise SystemExit(f"{args.binary} does not exist: bash benchmarks/peers/build_llama_perplexity.sh")

    whole = command(args)
    available = chunks_available(whole) if args.count else None
    run = subprocess.run([*whole, "--chunks", str(args.chunks)], capture_output=True, text=True)
    begins, ends = _BEGINS.search(run.stderr), _ENDS.search(run.stderr)
    if run.returncode or not begins or not ends:
        raise SystemExit(f"llama-perplexity failed ({run.returncode}):\n{run.stderr[-2000:]}")
    chunks, n_ctx = int(begins.group(5)), int(begins.group(6))
    print(
        json.dumps(
            {
                "ppl": float(ends.group(5)),
                "chunks": chunks,
                "chunks_available": available,
                "tokens": chunks * (n_ctx - 1 - n_ctx // 2),
                "tokens_decoded": chunks * n_ctx,
                "kernels": kernels(run.stderr),
                "seconds": _clock_seconds(ends) - _clock_seconds(begins),
                "peak_rss_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
