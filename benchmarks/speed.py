"""Speed: seconds spent scoring the same windows, evalq and its peers taking turns.

Loading, tokenization and start-up are left out on both sides. A ratio above 1 means that evalq is faster.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from figures import Bench, Case, Figure, within
from running import evalq, gguf_model, hf_model, peer

Seconds = Callable[[], float]
# The fastest way to run the transformer's body: the same batches as evalq, and no logits but the last ones.
LIMIT = ("--decode-only", "--flash-attn", "--batch=256")


@dataclass(frozen=True)
class Race:
    """Times of evalq and of each peer, one per repetition, for the same work."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The middle repetition."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Peer's time over evalq's: of the medians, and the lowest and highest of one turn."""
        turns = [
            theirs / ours for theirs, ours in zip(self.seconds[name], self.seconds["evalq"], strict=True)
        ]
        return self.median(name) / self.median("evalq"), min(turns), max(turns)


def take_turns(bench: Bench, runners: dict[str, Seconds]) -> Race:
    """Every runner once, then every runner again, so that a slow minute of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(bench.repetitions):
        for name in list(runners) if turn % 2 == 0 else list(reversed(runners)):
            seconds[name].append(runners[name]())
    return Race(seconds)


def figure(what: str, race: Race, name: str, forward_tokens: int, target: float | None) -> Figure:
    """One row: rates of tokens put through the model, and the ratio with its spread."""
    ratio, low, high = race.ratio(name)
    return Figure(
        what=what,
        evalq=f"{forward_tokens / race.median('evalq'):.0f} tok/s",
        peer=f"{name}: {forward_tokens / race.median(name):.0f} tok/s",
        value=f"{ratio:.3f} times ({low:.3f} to {high:.3f})",
        target="" if target is None else f"at least {target}",
        met=None if target is None else within(ratio, target, at_least=True),
    )


def _exllamav3(bench: Bench) -> list[Figure]:
    model = hf_model(bench)
    plain = ("plain_loop", "--model", bench.hf_dir, "--protocol=exllamav3", "--max-rows=4")
    race = take_turns(
        bench,
        {
            "evalq": lambda: evalq(bench, model, protocol="exllamav3", max_rows=4).seconds,
            "plain loop": lambda: peer(bench, *plain)["seconds"],
        },
    )
    return [figure("`hf`, `exllamav3`, L 2048, S 512, 4 windows", race, "plain loop", 4 * 2048, 1.0)]


def _hf_strided(bench: Bench) -> list[Figure]:
    model = hf_model(bench)
    plain = ("plain_loop", "--model", bench.hf_dir, "--protocol=hf-strided", "--max-tokens=4096")
    race = take_turns(
        bench,
        {
            "evalq": lambda: evalq(bench, model, protocol="hf-strided", max_tokens=4096).seconds,
            "plain loop": lambda: peer(bench, *plain)["seconds"],
        },
    )
    return [figure("`hf`, `hf-strided`, L 2048, S 512, 5 windows", race, "plain loop", 5 * 2048, 1.1)]


def _lm_eval(bench: Bench) -> list[Figure]:
    model = hf_model(bench)
    harness = ("lm_eval_wikitext", "--model", bench.hf_dir, "--max-length=2048", "--limit=2")
    tokens: list[int] = []

    def theirs() -> float:
        found = peer(bench, *harness)
        tokens.append(found["tokens"])
        return float(found["seconds"])

    race = take_turns(
        bench,
        {
            "evalq": lambda: evalq(bench, model, protocol="lm-eval", eval_len=2048, max_rows=2).seconds,
            "lm-eval": theirs,
        },
    )
    return [figure("`hf`, `lm-eval`, M 2048, 2 documents (scored tokens)", race, "lm-eval", tokens[0], 1.1)]


def _logits_all(quantization: str, target: float | None) -> Case:
    """Backend gguf on whole windows, against the high-level loop and against decoding alone."""

    def measure(bench: Bench) -> list[Figure]:
        model = gguf_model(bench, quantization)
        loop = ("logits_all", "--model", bench.gguf(quantization), "--max-rows=1")
        race = take_turns(
            bench,
            {
                "evalq": lambda: (
                    evalq(bench, model, protocol="exllamav3", max_rows=1, tokenize_fn="gguf").seconds
                ),
                "logits_all loop": lambda: peer(bench, *loop)["seconds"],
                "logits_all loop, flash attention": lambda: peer(bench, *loop, "--flash-attn")["seconds"],
                "llama_decode without logits": lambda: peer(bench, *loop, *LIMIT)["seconds"],
            },
        )
        what = f"`gguf` {quantization}, `exllamav3`, one window of 2048"
        return [
            figure(what, race, "logits_all loop", 2048, target),
            figure(what, race, "logits_all loop, flash attention", 2048, target),
            figure(f"{what}: share of the limit", race, "llama_decode without logits", 2048, None),
        ]

    return measure


def _llama_perplexity(quantization: str, chunks: int, target: float | None) -> Case:
    """Backend gguf on the llama.cpp protocol, against the tool of the same llama.cpp."""

    def measure(bench: Bench) -> list[Figure]:
        model = gguf_model(bench, quantization)
        tool = ("llama_perplexity", "--model", bench.gguf(quantization), "--n-ctx=512", f"--chunks={chunks}")
        spec = {"protocol": "llama.cpp", "eval_len": 512, "max_rows": chunks, "tokenize_fn": "gguf"}
        race = take_turns(
            bench,
            {
                "evalq": lambda: evalq(bench, model, **spec).seconds,
                "llama-perplexity": lambda: peer(bench, *tool)["seconds"],
            },
        )
        what = f"`gguf` {quantization}, `llama.cpp`, n_ctx 512, {chunks} chunks"
        return [figure(what, race, "llama-perplexity", chunks * 512, target)]

    return measure


CASES: dict[str, Case] = {
    "speed-hf-exllamav3": _exllamav3,
    "speed-hf-strided": _hf_strided,
    "speed-lm-eval": _lm_eval,
    "speed-logits-all-Q4_1": _logits_all("Q4_1", 1.1),
    "speed-llama-perplexity-Q4_1": _llama_perplexity("Q4_1", 8, 0.97),
    "speed-llama-perplexity-Q8_0": _llama_perplexity("Q8_0", 8, 0.97),
    "speed-llama-perplexity-F16": _llama_perplexity("F16", 8, 0.97),
}
