"""The perplexity loops that people write with transformers, for comparison. Knows nothing of evalq.

Full logits of every window, float32 log-softmax over all of them, one window at a time:
- exllamav3: https://github.com/turboderp-org/exllamav3/blob/master/eval/compare_q.py
- gptq: https://github.com/IST-DASLab/gptq/blob/main/llama.py
- hf-strided: https://huggingface.co/docs/transformers/perplexity, averaged with the true counts of targets

    python benchmarks/peers/plain_loop.py --model models/smollm2/bf16 --text wiki.test.raw --protocol gptq

Prints one JSON object: ppl, tokens (scored), windows, seconds (of the loop, without loading), and resident
memory in GiB after loading and at the loop's peak.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resident
import torch
import torch.nn.functional as F
import wikitext
from transformers import AutoModelForCausalLM, AutoTokenizer

NllAndCount = tuple[float, int]


def exllamav3(model: Any, ids_1N: torch.Tensor, length: int, stride: int) -> Iterator[NllAndCount]:
    """Every target of windows that start at 0, S, 2S, ... below N - L."""
    for start in range(0, ids_1N.shape[1] - length, stride):
        window = ids_1N[:, start : start + length]
        logits = model(window).logits[:, :-1, :].float()
        log_probs = F.log_softmax(logits, dim=-1)
        picked = log_probs.gather(-1, window[:, 1:].unsqueeze(-1)).squeeze(-1)
        yield -picked.double().sum().item(), picked.numel()


def gptq(model: Any, ids_1N: torch.Tensor, length: int, stride: int) -> Iterator[NllAndCount]:
    """Every target of N // L windows side by side."""
    for i in range(ids_1N.shape[1] // length):
        window = ids_1N[:, i * length : (i + 1) * length]
        logits = model(window).logits
        shift_logits = logits[:, :-1, :].contiguous().float()
        loss = F.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), window[:, 1:].reshape(-1))
        yield loss.item() * (length - 1), length - 1


def hf_strided(model: Any, ids_1N: torch.Tensor, length: int, stride: int) -> Iterator[NllAndCount]:
    """Windows that start at 0, S, 2S, ...; the loss masks every target that an earlier window had."""
    n_tokens = ids_1N.shape[1]
    previous_end = 0
    for start in range(0, n_tokens, stride):
        end = min(start + length, n_tokens)
        window = ids_1N[:, start:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        n_targets = int((labels[:, 1:] != -100).sum())
        if n_targets:
            yield model(window, labels=labels).loss.item() * n_targets, n_targets
        previous_end = end
        if end == n_tokens:
            return


LOOPS = {"exllamav3": exllamav3, "gptq": gptq, "hf-strided": hf_strided}


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity by a plain transformers loop")
    parser.add_argument("--model", required=True, help="a checkpoint directory")
    parser.add_argument("--text", required=True, type=Path, help="wiki.test.raw")
    parser.add_argument("--protocol", choices=LOOPS, default="exllamav3")
    parser.add_argument("--eval-len", type=int, default=2048)
    parser.add_argument("--eval-stride", type=int, default=512)
    parser.add_argument("--max-rows", type=int, help="the most windows")
    parser.add_argument("--max-tokens", type=int, help="only the first tokens of the text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids_1N = tokenizer(wikitext.joined(args.text), return_tensors="pt").input_ids[:, : args.max_tokens]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    resident.forget_peak()
    after_load_gib = resident.now_gib()

    nll_nats, n_targets, n_windows = 0.0, 0, 0
    began = time.perf_counter()
    with torch.inference_mode():
        windows = LOOPS[args.protocol](model, ids_1N, args.eval_len, args.eval_stride)
        for nll, count in windows:
            nll_nats, n_targets, n_windows = nll_nats + nll, n_targets + count, n_windows + 1
            if n_windows == args.max_rows:
                break
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "ppl": math.exp(nll_nats / n_targets),
                "tokens": n_targets,
                "windows": n_windows,
                "stream_tokens": ids_1N.shape[1],
                "seconds": seconds,
                "after_load_gib": after_load_gib,
                "peak_rss_gib": resident.peak_gib(),
            }
        )
    )


if __name__ == "__main__":
    main()
