"""docs/benchmarks.md, written from the results file; never edited by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_document import speed_section

INTRODUCTION = """\
# Benchmarks

Written by `benchmarks/run.py` from [results/benchmarks-cpu.json](results/benchmarks-cpu.json), which also
holds every single measurement. Everything is measured on real WikiText-2 (`wiki.test.raw`) with
SmolLM2-135M-Instruct: `bf16/` holds the weights of the Q4_1 GGUF file, dequantized, and runs in float32.

To measure again (about 40 minutes on two idle cores; `--resume` continues an interrupted run):

    make demo                                              # models/smollm2
    bash benchmarks/peers/build_llama_perplexity.sh        # llama-perplexity of the same llama.cpp
    bash benchmarks/peers/make_lm_eval_env.sh              # lm-evaluation-harness
    python benchmarks/run.py all --models models/smollm2 --wikitext2 wiki.test.raw

The section with 1.5 billion weights has a command of its own. LARGE/Q4_K_M.gguf is
`qwen2.5-coder-1.5b-instruct-q4_k_m.gguf`, and LARGE/bf16 is made of it:

    python benchmarks/gguf_to_hf.py LARGE/Q4_K_M.gguf TOKENIZER LARGE/bf16
    python benchmarks/run.py divergence-large --large LARGE --wikitext2 wiki.test.raw

One row alone: `python benchmarks/run.py --only NAME`, with the name in its last column. Speed is that of
scoring alone: loading, tokenization and start-up are left out on both sides; evalq and its peers take turns,
each in a process of its own with the same number of threads; the ratio is that of the medians, in brackets
the lowest and highest of one turn.
"""

TITLES = {
    "agreement": "Agreement with the tool that defines each protocol",
    "divergence": "KL divergence: agreement and cost",
    "divergence-large": "KL divergence: cost with a model of 1.5 billion weights",
    "speed": "Speed",
    "memory": "Memory",
    "latency": "Latency",
    "sweep": "How the gguf backend's sizes were picked",
}
NO_TARGET, MET, NOT_MET = "–", "yes", "**no**"


def _machine(machine: Mapping[str, Any]) -> list[str]:
    engines = machine.get("engines", {})
    found = {name: version for engine in engines.values() for name, version in engine.items()}
    software = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    return [
        "## Machine",
        "",
        f"{machine['cpu']}, {machine['threads_used']} threads used of {machine['cpu_threads']}, "
        f"{machine['ram_gib']} GiB RAM, {machine['system']}, Python {machine['python']}, "
        f"evalq {machine['evalq']}; {software}. llama.cpp was built "
        f"for {machine['llama_cpp']}.",
        "",
    ]


def _row(figure: Mapping[str, Any], name: str) -> str:
    met = figure["met"]
    verdict = NO_TARGET if met is None else MET if met else NOT_MET
    what = figure["what"] + (f" ({figure['note']})" if figure["note"] else "")
    cells = (what, figure["evalq"], figure["peer"], figure["value"], figure["target"], verdict, f"`{name}`")
    return "| " + " | ".join(cell.replace("|", "\\|") or NO_TARGET for cell in cells) + " |"


def _section(title: str, cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"## {title}", ""]
    lines += ["| figure | evalq | peer | result | target | met | name |", "|---|---|---|---|---|---|---|"]
    for name, case in cases.items():
        lines += [_row(figure, name) for figure in case["figures"]]
        if case["error"]:
            error = case["error"].splitlines()[0][:200].replace("|", "\\|")
            lines.append(f"| not measured: {error} | | | | | {NOT_MET} | `{name}` |")
    dates = sorted(case["measured_at"][:10] for case in cases.values())
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [*lines, "", f"Measured {period}.", ""]


def write_document(
    path: Path, machine: Mapping[str, Any], cases: Mapping[str, Any], sections: Mapping[str, list[str]]
) -> None:
    """Write the Markdown.

    Args:
        path: docs/benchmarks.md.
        machine: `evalq env --json`, with threads_used and llama_cpp.
        cases: name -> what the results file holds of it.
        sections: name -> its cases, in order.
    """
    lines = [INTRODUCTION, *_machine(machine)]
    for section, names in sections.items():
        measured = {name: cases[name] for name in names if name in cases}
        if measured:
            lines += _section(TITLES[section], measured)
    lines += speed_section(path.parent / "results" / "vllm-h200.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
