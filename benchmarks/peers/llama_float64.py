"""KL divergence of two GGUF files in float64 from llama.cpp's own logits, written down plainly.

    python benchmarks/peers/llama_float64.py --reference F16.gguf --model Q4_1.gguf --text wiki.test.raw

Positions are llama-perplexity's: the second half of each chunk. Keys: kld; kld_coded, the same as its file of
the reference makes it: log-probabilities in 16 bits between the largest and 16 below, what is below -16 left
out (tools/perplexity/perplexity.cpp); tokens. Knows nothing of evalq.
"""

import argparse
import json
from pathlib import Path

import llama_cpp
import numpy as np


def scores(file: Path, text: str, n_ctx: int, chunks: int, threads: int) -> np.ndarray:
    """Logits that predict the scored tokens, float32 [n, V]."""
    model = llama_cpp.Llama(
        str(file),
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_threads=threads,
        logits_all=True,
        flash_attn=True,
        verbose=False,
    )
    ids = model.tokenize(text.encode(), add_bos=True, special=False)
    found = []
    for chunk in range(chunks):
        model.reset()
        model.eval(ids[chunk * n_ctx : (chunk + 1) * n_ctx])
        found.append(np.array(model.scores[n_ctx // 2 : n_ctx - 1]))
    return np.concatenate(found)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    below = logits.astype(np.float64) - float(logits.max())
    return np.asarray(below - np.log(np.exp(below).sum()))


def main() -> None:
    """Row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("reference", "model", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[: args.n_ctx * args.chunks * 10]
    sides = [
        scores(file, text, args.n_ctx, args.chunks, args.threads) for file in (args.reference, args.model)
    ]
    exact, coded = [], []
    for p_V, q_V in zip(*sides, strict=True):
        p, q = log_softmax(p_V), log_softmax(q_V)
        exact.append((np.exp(p) * (p - q)).sum())
        lowest = max(p.min(), p.max() - 16)
        step = (p.max() - lowest) / 65535
        kept = lowest + step * np.rint(np.clip(p - lowest, 0, None) / step)
        there = kept > -16
        coded.append((np.exp(kept[there]) * (kept[there] - q[there])).sum())
    found = {"kld": np.mean(exact), "kld_coded": np.mean(coded), "tokens": len(exact)}
    print(json.dumps({name: float(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
