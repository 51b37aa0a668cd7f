"""Runs llama-perplexity --kl-divergence and prints what it says as one JSON object. Knows nothing of evalq.

    python benchmarks/peers/llama_kld.py --reference F16.gguf --model Q4_1.gguf --text wiki.test.raw

Keys: kld, kld_stderr, kld_median, kld_p99_9 (nats), same_top, delta_p_rms, delta_p (shares), ln_correlation,
ppl. The reference's log-probabilities go into a file of 16 bits each, as the tool does it.
The tool itself: build_llama_perplexity.sh beside this file.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

BINARY = Path(__file__).resolve().parents[2] / ".work/llama.cpp/build/bin/llama-perplexity"
_NUMBER = r"\s*(-?[\d.]+)"
_LINES = {
    "ppl": r"Mean PPL\(Q\)\s*:" + _NUMBER,
    "ln_correlation": r"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\):" + _NUMBER + "%",
    "kld": r"Mean\s+KLD:" + _NUMBER,
    "kld_stderr": r"Mean\s+KLD:\s*[\d.]+\s*±" + _NUMBER,
    "kld_median": r"Median\s+KLD:" + _NUMBER,
    "kld_p99_9": r"99\.9%\s+KLD:" + _NUMBER,
    "delta_p": r"Mean\s+Δp:" + _NUMBER,
    "delta_p_rms": r"RMS\s+Δp\s*:" + _NUMBER,
    "same_top": r"Same top p:" + _NUMBER,
}
_PERCENT = ("ln_correlation", "delta_p", "delta_p_rms", "same_top")


def main() -> None:
    """Score the reference, then the model beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("reference", "model", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    common = ["-f", args.text, "-c", args.n_ctx, "--chunks", args.chunks, "-t", args.threads]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.kld"
        _run("-m", args.reference, "--kl-divergence-base", base, *common)
        said = _run("-m", args.model, "--kl-divergence-base", base, "--kl-divergence", *common)
    found = {}
    for name, pattern in _LINES.items():
        match = re.search(pattern, said)
        if match is None:
            raise SystemExit(f"llama-perplexity said no {name}: {said[-2000:]}")
        found[name] = float(match.group(1)) / (100 if name in _PERCENT else 1)
    print(json.dumps(found))


def _run(*arguments: object) -> str:
    done = subprocess.run([str(BINARY), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-perplexity ended with {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
