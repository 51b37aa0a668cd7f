"""Tables of the runs on a GPU host, from docs/results/vllm-h200.json.

    python benchmarks/gpu_document.py --work DIR

DIR is that of benchmarks/gpu/vllm_truth.py and vllm_speed.py. Its results are kept in
docs/results/vllm-h200.json, and the tables written into docs/vllm.md between its marks; the speed is in
docs/benchmarks.md too.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "vllm-h200.json"
SIDES = {
    "evalq": "evalq",
    "lm-eval": "lm-eval, its vLLM class",
    "top20": "`prompt_logprobs=20`, one window per call",
    "evalq-narrow": "evalq, steps of 2048 tokens",
    "lm-eval-narrow": "lm-eval, steps of 2048 tokens",
}
TARGET_TIMES = 1.5


def speed_section(results: Path) -> list[str]:
    """Markdown of the speed beside the peers; nothing without results."""
    if not results.is_file():
        return []
    speed = json.loads(results.read_text(encoding="utf-8"))["speed"]
    versions, gpu = speed["versions"], speed["hardware"]["gpus"][0]["name"]
    lines = [
        "## vLLM on a GPU",
        "",
        f"One {gpu}, vLLM {versions['vllm']}, lm-eval {versions['lm_eval']}, {speed['windows']} windows of "
        f"{speed['window_tokens']} tokens, SmolLM2-135M-Instruct padded by `demo/pad.py`, BF16. All sides",
        "have the same engine settings (steps of 16384 tokens, or 2048 where named) and the same perplexity; "
        "median of three warm passes.",
        "`python benchmarks/gpu/vllm_speed.py run ...` measures them (see its first lines), "
        "`python benchmarks/gpu_document.py` writes this.",
        "",
        "| side | PPL | tok/s | evalq is | target | peak above the loaded engine |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name, side in speed["sides"].items():
        is_peer = not name.startswith("evalq")
        times = f"{side['evalq_times_as_fast']:.2f} times as fast" if is_peer else ""
        target = f"at least {TARGET_TIMES}" if is_peer and not name.endswith("narrow") else "–"
        lines.append(
            f"| {SIDES[name]} | {side['ppl']:.4f} | {side['tokens_per_second']:,.0f} | {times} | {target} "
            f"| {side['peak_above_weights_mib']:,.0f} MiB |"
        )
    return [*lines, ""]


def agreement_section(results: dict[str, Any]) -> list[str]:
    """Markdown of the perplexities beside transformers' and between engines."""
    lines = ["| model | PPL | beside | PPL | apart | target | met |", "|---|---:|---|---:|---:|---|---|"]
    for pair in results["agreement"]["pairs"]:
        met = "yes" if pair["met"] else "**no**"
        lines.append(
            f"| {pair['model']} | {pair['ppl']:.4f} | {pair['beside']} | {pair['ppl_beside']:.4f} "
            f"| {pair['percent_apart']:+.4f} % | within {pair['percent_max']} % | {met} |"
        )
    return lines


def memory_section(results: dict[str, Any]) -> list[str]:
    """Markdown of what vLLM said it used."""
    lines = [
        "| model | weights | peak activation | non-torch | KV cache | KV tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, memory in results["agreement"]["vllm_memory"].items():
        parts = ("weights_gib", "peak_activation_gib", "non_torch_gib")
        cells = " | ".join(f"{memory[part]:.3f}" for part in parts)
        lines.append(
            f"| {label} | {cells} | {memory['kv_cache_gib']:.2f} | {memory['kv_cache_tokens']:,.0f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="take new results from there first")
    work = parser.parse_args().work
    if work is not None:
        parts = {
            name: json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("agreement", "speed")
        }
        parts["records"] = json.loads((work / "vllm.records.json").read_text(encoding="utf-8"))
        RESULTS.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    sections = {
        "agreement": agreement_section(results),
        "memory": memory_section(results),
        "speed": speed_section(RESULTS)[2:],
    }
    page = DOCS / "vllm.md"
    text = page.read_text(encoding="utf-8")
    for name, lines in sections.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = "\n".join(lines).strip() + "\n"
        text, count = marks.subn(lambda found, body=body: f"{found[1]}{body}{found[2]}", text)  # type: ignore[misc]
        assert count == 1, f"docs/vllm.md has one place for {name}"
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
