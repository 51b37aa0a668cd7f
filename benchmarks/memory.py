"""Memory: what scoring takes on top of the loaded weights, and whether it grows with the number of windows.

The figure is the kernel's high-water mark of resident memory while scoring minus what was resident after
loading, each told by the process itself. evalq's peak is also sampled from outside, ten times a second, as
a check that the record tells the truth.
"""

from typing import Any

from figures import Bench, Case, Figure, within
from running import EvalqRun, evalq, gguf_model, hf_model, peer

MIB_PER_GIB = 1024
# What an allocator may keep; the logits of one window of 2048 tokens are 384 MiB.
GROWTH_LIMIT_MIB = 32.0
OUTSIDE_LIMIT = 0.05


def _above_load_mib(found: dict[str, Any]) -> float:
    return float(found["peak_rss_gib"] - found["after_load_gib"]) * MIB_PER_GIB


def figures(what: str, few: EvalqRun, many: EvalqRun, theirs: dict[str, Any], name: str) -> list[Figure]:
    """Against the loop, against more windows, against the sampling from outside."""
    few_mib, many_mib = few.above_load_gib * MIB_PER_GIB, many.above_load_gib * MIB_PER_GIB
    loop_mib = _above_load_mib(theirs)
    share = many_mib / loop_mib
    growth_mib = many_mib - few_mib
    told, seen = float(many.record["peak_memory_gib"]), many.outside_peak_gib
    windows = (few.record["comparison"]["windows"], many.record["comparison"]["windows"])
    return [
        Figure(
            what=f"{what}: peak above the loaded model, {windows[1]} windows",
            evalq=f"{many_mib:.0f} MiB",
            peer=f"{name}, {theirs['windows']} windows: {loop_mib:.0f} MiB",
            value=f"{share:.3f} of the peer's",
            target="at most 0.5",
            met=within(share, 0.5, at_least=False),
        ),
        Figure(
            what=f"{what}: growth from {windows[0]} to {windows[1]} windows",
            evalq=f"{few_mib:.0f} and {many_mib:.0f} MiB",
            peer="",
            value=f"{growth_mib:+.1f} MiB",
            target=f"at most {GROWTH_LIMIT_MIB:.0f} MiB",
            met=within(growth_mib, GROWTH_LIMIT_MIB, at_least=False),
        ),
        Figure(
            what=f"{what}: `peak_memory_gib` of the record against sampling from outside",
            evalq=f"{told:.3f} GiB",
            peer=f"psutil: {seen:.3f} GiB",
            value=f"{(told / seen - 1) * 100:+.2f}%",
            target=f"within {OUTSIDE_LIMIT * 100:.0f}%",
            met=within(abs(told / seen - 1), OUTSIDE_LIMIT, at_least=False),
        ),
    ]


def _hf(bench: Bench) -> list[Figure]:
    few = evalq(bench, hf_model(bench), protocol="exllamav3", max_rows=4)
    theirs = peer(bench, "plain_loop", "--model", bench.hf_dir, "--protocol=exllamav3", "--max-rows=4")
    many = evalq(bench, hf_model(bench), protocol="exllamav3", max_rows=16)
    return figures("`hf`, fp32, `exllamav3`, L 2048", few, many, theirs, "plain loop")


def _gguf(bench: Bench) -> list[Figure]:
    """Q8_0, which decodes fastest here; what is held does not depend on the quantization."""
    model, size = gguf_model(bench, "Q8_0"), {"protocol": "exllamav3", "tokenize_fn": "gguf"}
    few = evalq(bench, model, max_rows=2, **size)
    theirs = peer(bench, "logits_all", "--model", bench.gguf("Q8_0"), "--max-rows=2")
    many = evalq(bench, model, max_rows=8, **size)
    return figures("`gguf` Q8_0, `exllamav3`, L 2048", few, many, theirs, "logits_all loop")


CASES: dict[str, Case] = {"memory-hf": _hf, "memory-gguf": _gguf}
