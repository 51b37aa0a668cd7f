"""Agreement: the same perplexity as the tool that defines a protocol, on the first part of WikiText-2."""

import re
from typing import Any

from figures import Bench, Case, Figure, within
from running import EvalqRun, evalq, gguf_model, hf_model, peer

from evalq.data.windows import ProtocolSettings, StreamFacts, plan_windows


def _figure(what: str, ours: EvalqRun, theirs: dict[str, Any], name: str, limit_percent: float) -> Figure:
    """Perplexities side by side; another number of scored tokens is a failure whatever the perplexity."""
    key, unit = ("word_ppl", "word PPL") if "word_ppl" in theirs else ("ppl", "PPL")
    mine = float(ours.record[key])
    percent = abs(mine / theirs[key] - 1) * 100
    same_count = ours.tokens == theirs["tokens"]
    counts = (
        f"{ours.tokens:,} tokens scored" if same_count else f"tokens {ours.tokens:,} and {theirs['tokens']:,}"
    )
    return Figure(
        what=f"{what}, {counts}",
        evalq=f"{unit} {mine:.4f}",
        peer=f"{name}: {theirs[key]:.4f}",
        value=f"{percent:.4f}% apart",
        target=f"within {limit_percent}%, same tokens",
        met=same_count and within(percent, limit_percent, at_least=False),
    )


def _plain(what: str, protocol: str, **size: int) -> Case:
    """Backend hf against the plain loop of the same protocol."""

    def measure(bench: Bench) -> list[Figure]:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
        theirs = peer(bench, "plain_loop", "--model", bench.hf_dir, "--protocol", protocol, *arguments)
        ours = evalq(bench, hf_model(bench), protocol=protocol, **size)
        return [_figure(what, ours, theirs, "plain loop, fp32", 0.01)]

    return measure


def wheel_kernels() -> list[str]:
    """The instruction sets that llama-cpp-python's llama.cpp was built for."""
    from llama_cpp import llama_print_system_info

    return re.findall(r"(\w+) = 1", llama_print_system_info().decode())


def _llama_cpp(bench: Bench) -> list[Figure]:
    """33 chunks: eight full batches of llama-perplexity's four, and one of one."""
    model = bench.gguf("Q4_1")
    theirs = peer(bench, "llama_perplexity", "--model", model, "--n-ctx=512", "--chunks=33", "--count")
    spec = gguf_model(bench, "Q4_1")
    ours = evalq(bench, spec, protocol="llama.cpp", eval_len=512, max_rows=33, tokenize_fn="gguf")
    stream_tokens = ours.record["comparison"]["tokens"]
    whole = plan_windows(ProtocolSettings("llama.cpp", 512), StreamFacts(stream_tokens))
    chunks = Figure(
        what="`llama.cpp` protocol, n_ctx 512: chunks in the whole text",
        evalq=f"{len(whole.windows)}",
        peer=f"llama-perplexity: {theirs['chunks_available']}",
        value=f"{abs(len(whole.windows) - theirs['chunks_available'])} apart",
        target="the same",
        met=len(whole.windows) == theirs["chunks_available"],
    )
    built_alike = wheel_kernels() == theirs["kernels"]
    kernels = Figure(
        what="llama.cpp in both: instruction sets it was built for",
        evalq=f"{len(wheel_kernels())}",
        peer=f"llama-perplexity: {len(theirs['kernels'])}",
        value="the same" if built_alike else ", ".join(set(wheel_kernels()) ^ set(theirs["kernels"])),
        target="the same",
        met=built_alike,
    )
    agreed = _figure("`llama.cpp`, Q4_1, n_ctx 512", ours, theirs, "llama-perplexity", 0.1)
    return [agreed, chunks, kernels]


def _lm_eval(bench: Bench) -> list[Figure]:
    theirs = peer(bench, "lm_eval_wikitext", "--model", bench.hf_dir, "--max-length=2048", "--limit=4")
    ours = evalq(bench, hf_model(bench), protocol="lm-eval", eval_len=2048, max_rows=4)
    return [_figure("`lm-eval`, fp32, M 2048, 4 documents", ours, theirs, "lm-eval, task wikitext", 0.1)]


CASES: dict[str, Case] = {
    "agree-exllamav3": _plain("`exllamav3`, fp32, L 2048, S 512", "exllamav3", max_rows=7),
    "agree-gptq": _plain("`gptq`, fp32, L 2048", "gptq", eval_len=2048, max_rows=5),
    "agree-hf-strided": _plain("`hf-strided`, fp32, L 2048, S 512", "hf-strided", max_tokens=9216),
    "agree-llama.cpp": _llama_cpp,
    "agree-lm-eval": _lm_eval,
}
