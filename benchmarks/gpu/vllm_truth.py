"""evalq's vllm backend on a GPU: agreement with transformers on the same files, between engines, and memory.

    python benchmarks/gpu/checkpoints.py --hf CHECKPOINT --out DIR
    python benchmarks/gpu/vllm_truth.py score --hf CHECKPOINT --wikitext wiki.test.raw --work DIR
    python benchmarks/gpu/vllm_truth.py agree --work DIR

`score` runs the command line on every format and engine (--engines hf vllm exl3) with one store, DIR/store,
and writes DIR/ENGINE.records.json; run engines one after the other, because vLLM measures the memory that is
free. `agree` compares their perplexities, writes DIR/agreement.json and ends with 1 if a pair is too far
apart. EXL3 checkpoints are those of exl3_truth.py in the same DIR. Where vLLM has an environment of its own,
DIR/evalq.toml names it (docs/specs.md).

A format's partner is transformers on the same files, dequantized. Where the format quantizes activations too
the partner either leaves that out or simulates it, and each is compared with the vLLM run that does the same.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import EVAL_LEN, EVAL_STRIDE, WINDOWS, start_compare, versions, write_data_spec

from evalq.machine import environment

Spec = dict[str, Any]
WEIGHTS_ALONE = {"quantize_activations": False}
EMULATED = {"linear_backend": "emulation"}
# Label -> checkpoint's folder and what the transformers partner needs to be told.
FORMATS: dict[str, tuple[str, Spec]] = {
    "INT8": ("int8", {}),
    "FP8": ("fp8", WEIGHTS_ALONE),
    "INT4 g128": ("int4", {}),
    "INT4 g128 asym": ("int4-asym", {}),
    "NVFP4 A16": ("nvfp4a16", {}),
    "NVFP4 A4": ("nvfp4", WEIGHTS_ALONE),
}
EXL3_RATES = ("2.0", "3.0", "4.0", "5.0", "6.0")
ANCHORS = ("BF16 vLLM", "BF16 transformers", "FP32 transformers", "EXL3 FP16")
ANCHORS_MAX_PERCENT, BF16_MAX_PERCENT, FORMAT_MAX_PERCENT = 0.2, 0.1, 0.5


def hf_specs(hf: Path, work: Path) -> list[Spec]:
    """Transformers: unquantized twice, every format dequantized, and with simulated activations."""
    specs: list[Spec] = [
        {"label": "BF16 transformers", "model_dir": str(hf)},
        {"label": "FP32 transformers", "model_dir": str(hf), "options": {"dtype": "float32"}},
    ]
    for label, (folder, options) in FORMATS.items():
        model = {"model_dir": str(work / folder)}
        specs.append({"label": f"{label} transformers", **model, "options": options})
        if options == WEIGHTS_ALONE:
            specs.append({"label": f"{label} transformers simulated", **model})
    return [{"load_fn": "hf"} | spec for spec in specs]


def vllm_specs(hf: Path, work: Path, utilization: float | None) -> list[Spec]:
    """VLLM: every format with the kernels it chooses, and NVFP4 activations in the format's own numerics."""
    options = {} if utilization is None else {"gpu_memory_utilization": utilization}
    specs: list[Spec] = [{"label": "BF16 vLLM", "model_dir": str(hf)}]
    specs += [{"label": f"{label} vLLM", "model_dir": str(work / f)} for label, (f, _) in FORMATS.items()]
    emulated: Spec = {"label": "NVFP4 A4 vLLM emulated", "model_dir": str(work / "nvfp4")}
    specs = [spec | {"options": options} for spec in specs] + [emulated | {"options": options | EMULATED}]
    return [{"load_fn": "vllm"} | spec for spec in specs]


def exl3_specs(hf: Path, work: Path) -> list[Spec]:
    """Exllamav3: the converted rates that are there, and the unquantized checkpoint."""
    found = [rate for rate in EXL3_RATES if (work / f"exl3-{rate}" / "config.json").is_file()]
    specs: list[Spec] = [{"label": f"EXL3 {rate}", "model_dir": str(work / f"exl3-{rate}")} for rate in found]
    return [{"load_fn": "exl3"} | spec for spec in [*specs, {"label": "EXL3 FP16", "model_dir": str(hf)}]]


def score(arguments: argparse.Namespace) -> int:
    """Run the command line, engine after engine. The exit code is that of the worst of them."""
    hf, work = arguments.hf, arguments.work
    made = {
        "hf": lambda: hf_specs(hf, work),
        "vllm": lambda: vllm_specs(hf, work, arguments.utilization),
        "exl3": lambda: exl3_specs(hf, work),
    }
    data = write_data_spec(work, arguments.wikitext, hf, arguments.windows)
    worst = 0
    for engine in arguments.engines:
        specs = [spec for spec in made[engine]() if Path(spec["model_dir"]).is_dir()]
        if arguments.only:
            specs = [spec for spec in specs if any(part in spec["label"] for part in arguments.only)]
        _, process = start_compare(specs, engine, data, work / "store")
        worst = max(worst, process.wait())
    return worst


def pairs() -> list[tuple[str, str, float]]:
    """Two labels and how many percent their perplexities may differ."""
    found = [("BF16 vLLM", "BF16 transformers", BF16_MAX_PERCENT)]
    # vLLM quantizes FP8's activations, as the format asks; 4-bit ones on Hopper only when it emulates them.
    with_activations = {"FP8": "FP8 vLLM", "NVFP4 A4": "NVFP4 A4 vLLM emulated"}
    alone = [label for label in FORMATS if label != "FP8"]
    found += [(f"{label} vLLM", f"{label} transformers", FORMAT_MAX_PERCENT) for label in alone]
    found += [
        (ours, f"{label} transformers simulated", FORMAT_MAX_PERCENT)
        for label, ours in with_activations.items()
    ]
    anchors = [(a, b, ANCHORS_MAX_PERCENT) for i, a in enumerate(ANCHORS) for b in ANCHORS[i + 1 :]]
    return found + [pair for pair in anchors if pair[:2] != found[0][:2]]


def agree(arguments: argparse.Namespace) -> int:
    """Compare what was scored. 1 if a pair of models is missing or too far apart."""
    work: Path = arguments.work
    files = [file for file in (work / f"{engine}.records.json" for engine in ("hf", "vllm", "exl3"))]
    records = [r for file in files if file.is_file() for r in json.loads(file.read_text())]
    ppl = {record["label"]: record["ppl"] for record in records if record["status"] == "ok"}
    rows = []
    for one, other, limit in pairs():
        both = one in ppl and other in ppl
        percent = 100 * (ppl[one] / ppl[other] - 1) if both else None
        met = percent is not None and abs(percent) <= limit
        row = {"model": one, "ppl": ppl.get(one), "beside": other, "ppl_beside": ppl.get(other)}
        rows.append(row | {"percent_apart": percent, "percent_max": limit, "met": met})
        apart = "missing" if percent is None else f"{percent:+.4f}%"
        print(f"{'ok ' if met else 'NOT'} {one}: {apart} from {other} (at most {limit}%)", flush=True)
    vllm = [record for record in records if record["engine"] == "vllm" and record["status"] == "ok"]
    memory = {record["label"]: record["execution"]["memory"] for record in vllm}
    summary = {
        "versions": versions("evalq", "torch", "transformers", "compressed-tensors", "exllamav3"),
        "hardware": environment(),
        "protocol": {"name": "exllamav3", "eval_len": EVAL_LEN, "eval_stride": EVAL_STRIDE},
        "pairs": rows,
        "vllm_memory": memory,
        "failed": {r["label"]: r["error"] for r in records if r["status"] != "ok"},
    }
    (work / "agreement.json").write_text(json.dumps(summary, indent=1))
    return 0 if all(row["met"] for row in rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("--hf", type=Path, required=True, help="the unquantized checkpoint")
    scoring.add_argument("--wikitext", type=Path, required=True)
    scoring.add_argument("--engines", nargs="+", default=["hf", "exl3", "vllm"])
    scoring.add_argument("--windows", type=int, default=WINDOWS)
    scoring.add_argument("--utilization", type=float, default=0.5, help="vLLM's share of the GPU")
    scoring.add_argument("--only", nargs="+", help="labels with one of these parts")
    for command in (scoring, commands.add_parser("agree")):
        command.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    for name in {"hf", "wikitext", "work"} & set(vars(arguments)):
        setattr(arguments, name, getattr(arguments, name).resolve())
    return score(arguments) if arguments.command == "score" else agree(arguments)


if __name__ == "__main__":
    sys.exit(main())
