"""How the gguf backend's default sizes were picked: tokens per second over n_batch, n_ubatch and threads.

Not part of `all`: it takes about 20 minutes on two cores.
"""

import statistics

from figures import Bench, Case, Figure
from running import evalq, gguf_model

WINDOWS = 2
EVAL_LEN = 2048
SIZES = (64, 128, 256, 512, 1024, 2048)


def _batches(quantization: str) -> Case:
    """n_batch = n_ubatch = size, and llama.cpp's own pair; every size once, then every size again."""

    def measure(bench: Bench) -> list[Figure]:
        choices: dict[str, dict[str, object]] = {
            f"n_batch = n_ubatch = {n}": {"n_batch": n, "n_ubatch": n} for n in SIZES
        }
        choices["n_batch 2048, n_ubatch 512"] = {"n_batch": 2048, "n_ubatch": 512}
        return _compare(bench, quantization, choices)

    return measure


def _threads(bench: Bench) -> list[Figure]:
    """Around the number of cores given."""
    counts = sorted({1, max(1, bench.threads // 2), bench.threads, 2 * bench.threads})
    return _compare(bench, "Q4_1", {f"{n} threads": {"threads": n} for n in counts})


def _compare(bench: Bench, quantization: str, choices: dict[str, dict[str, object]]) -> list[Figure]:
    """One row per choice of options, against the backend's defaults."""
    choices = {"defaults": {}, **choices}
    rates: dict[str, list[float]] = {name: [] for name in choices}
    peaks_mib = dict.fromkeys(choices, 0.0)
    for _ in range(2):
        for name, options in choices.items():
            model = gguf_model(bench, quantization, **options)
            found = evalq(bench, model, protocol="exllamav3", max_rows=WINDOWS, tokenize_fn="gguf")
            rates[name].append(WINDOWS * EVAL_LEN / found.seconds)
            peaks_mib[name] = max(peaks_mib[name], found.above_load_gib * 1024)
    base = statistics.mean(rates["defaults"])
    return [
        Figure(
            what=f"{quantization}, {name}",
            evalq=f"{statistics.mean(rates[name]):.0f} tok/s, {peaks_mib[name]:.0f} MiB above load",
            peer=f"defaults: {base:.0f} tok/s",
            value=f"{statistics.mean(rates[name]) / base:.3f} times",
        )
        for name in choices
    ]


CASES: dict[str, Case] = {
    "sweep-batch-Q4_1": _batches("Q4_1"),
    "sweep-batch-Q8_0": _batches("Q8_0"),
    "sweep-batch-F16": _batches("F16"),
    "sweep-threads": _threads,
}
