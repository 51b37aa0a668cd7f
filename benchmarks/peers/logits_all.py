"""The perplexity loop that people write with llama-cpp-python, for comparison. Knows nothing of evalq.

`Llama(logits_all=True)` keeps the logits of every position in a float32 array of its own; the loop then takes
a float32 log-softmax over it. Windows start at 0, S, 2S, ... below N - L and all L - 1 targets count
(protocol exllamav3), tokenized by the GGUF file's own tokenizer.

The package leaves flash attention off unless it is asked for, llama.cpp's own programs do not: --flash-attn.
With --decode-only nothing but llama_decode runs, without logits beyond the last position's: the most tokens
per second that any program on this build can reach.

    python benchmarks/peers/logits_all.py --model models/smollm2/X.gguf --text wiki.test.raw --max-rows 4

Prints one JSON object: ppl, tokens (scored), tokens_decoded, windows, seconds (of the loop, without
loading), and resident memory in GiB after loading and at the loop's peak.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import resident
import wikitext
from llama_cpp import Llama


def window_nll_nats(llm: Llama, window: list[int]) -> float:
    """The summed negative log-likelihood of window[1:]."""
    llm.reset()
    llm.eval(window)
    logits = llm.scores[: len(window) - 1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -float(log_probs[np.arange(len(window) - 1), window[1:]].sum(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity by llama-cpp-python's high-level interface")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--text", required=True, type=Path, help="wiki.test.raw")
    parser.add_argument("--eval-len", type=int, default=2048)
    parser.add_argument("--eval-stride", type=int, default=512)
    parser.add_argument("--max-rows", type=int, help="the most windows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=512, help="n_batch and n_ubatch (the package's default)")
    parser.add_argument("--flash-attn", action="store_true", help="off by default, as in the package")
    parser.add_argument("--decode-only", action="store_true", help="no logits, no perplexity")
    args = parser.parse_args()

    llm = Llama(
        args.model,
        n_ctx=args.eval_len,
        n_batch=args.batch,
        n_ubatch=args.batch,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        flash_attn=args.flash_attn,
        logits_all=not args.decode_only,
        verbose=False,
    )
    ids = llm.tokenize(wikitext.joined(args.text).encode("utf-8"), add_bos=False, special=False)
    starts = range(0, len(ids) - args.eval_len, args.eval_stride)[: args.max_rows]
    windows = [ids[start : start + args.eval_len] for start in starts]
    resident.forget_peak()
    after_load_gib = resident.now_gib()

    nll_nats = 0.0
    began = time.perf_counter()
    for window in windows:
        if args.decode_only:
            llm.reset()
            llm.eval(window)
        else:
            nll_nats += window_nll_nats(llm, window)
    seconds = time.perf_counter() - began
    n_targets = 0 if args.decode_only else len(windows) * (args.eval_len - 1)
    print(
        json.dumps(
            {
                "ppl": math.exp(nll_nats / n_targets) if n_targets else None,
                "tokens": n_targets,
                "tokens_decoded": len(windows) * args.eval_len,
                "windows": len(windows),
                "stream_tokens": len(ids),
                "seconds": seconds,
                "after_load_gib": after_load_gib,
                "peak_rss_gib": resident.peak_gib(),
            }
        )
    )


if __name__ == "__main__":
    main()
