"""KL divergence of formats and engines on a GPU host: the figures of docs/divergence.md, and what they cost.

    python benchmarks/gpu/kld.py run --name NAME --hf CHECKPOINT --formats DIR --wikitext FILE --work DIR
    python benchmarks/gpu/kld.py document --work DIR --picture NAME

`--wikitext` names wiki.test.raw. FORMATS holds int4/, nvfp4a16/ ... as benchmarks/gpu/checkpoints.py makes
them, and exl3-4.0/ by exllamav3. Engines in environments of their own are named in WORK/evalq.toml
([engines.vllm] python = ...), and for the timing in --python. `run` scores everything beside the checkpoint
in transformers, draws NAME-light.png and NAME-dark.png, then times each engine with and without KL
divergence: in one process taking turns, vLLM in two, because it is another engine with it. `document` keeps
what `run` left of every model in docs/results/kld-h200.json, writes the tables between the marks of
docs/divergence.md, and with --picture copies the two drawings of that name to docs/images/kld-*.png.

Without a GPU, two windows of 256 tokens in transformers alone show that everything works:

    python benchmarks/gpu/kld.py run ... --engines hf --windows 2 --length 256 --passes 1
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import start_compare, versions

from evalq.machine import environment

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "kld-h200.json"
LIMITS = {"hf": 1.3, "vllm": 1.3, "exl3": 1.3}
# Timed: the plain model of each engine, and one of 4 bits.
TIMED = ("BF16", "FP16", "int4", "4.0")
LOOKS = {"light": (), "dark": ("-dark",)}
MARKS = ("<!-- kld-h200 begins: benchmarks/gpu/kld.py -->", "<!-- kld-h200 ends -->")
FACTS = (
    "label",
    "engine",
    "engine_version",
    "layer_bpw",
    "vram_gb",
    "ppl",
    "ppl_stderr",
    "tokens_scored",
    "notes",
)


def specs(hf: Path, formats: Path, engines: list[str]) -> list[dict[str, Any]]:
    """The reference, every format in transformers and in vLLM, and what exllamav3 makes of the checkpoint.

    The reference is in transformers, whatever engines are asked for.
    """
    kinds = sorted(folder.name for folder in formats.iterdir() if (folder / "config.json").is_file())
    packed = [kind for kind in kinds if kind.startswith("exl3")]
    found = [_spec("hf", "hf BF16", hf) | {"reference": True}]
    for engine in (name for name in ("hf", "vllm") if name in engines):
        found += [] if engine == "hf" else [_spec(engine, f"{engine} BF16", hf)]
        found += [_spec(engine, f"{engine} {kind}", formats / kind) for kind in kinds if kind not in packed]
    if "exl3" not in engines:
        return found
    found.append(_spec("exl3", "exl3 FP16", hf))
    return found + [_spec("exl3", kind.replace("-", " "), formats / kind) for kind in packed]


def _spec(engine: str, label: str, folder: Path) -> dict[str, Any]:
    return {"load_fn": engine, "label": label, "model_dir": str(folder)}


def run(given: argparse.Namespace) -> None:
    """Score and draw, then time; WORK/NAME.kld.json holds both."""
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    data = work / "kld-data.json"
    chosen = {"dataset": "wiki2", "path": str(given.wikitext), "protocol": "gptq"}
    data.write_text(json.dumps(chosen | {"eval_len": given.length, "max_rows": given.windows}))
    models, store = specs(given.hf, given.formats, given.engines), work / f"store-{given.name}"
    for look, flags in LOOKS.items():  # the second one shows what the first one has scored
        picture = ("-o", str(_picture(work, given.name, look)), "-t", f"{given.name}: KL divergence")
        out, process = start_compare(
            models, given.name, data, store, "--noise-floor", "-kld", *picture, *flags
        )
        process.wait()
    records = json.loads(out.read_text())
    scored = {record["label"] for record in records if record["status"] == "ok"}
    timed = [s for s in models if s["label"] in scored and s["label"].split(" ", 1)[1] in TIMED]
    kept = sum(file.stat().st_size for file in store.glob("references/*/*"))
    found = {
        "name": given.name,
        "windows": given.windows,
        "window_tokens": given.length,
        "hardware": environment(),
        "versions": versions("evalq", "torch", "transformers", "compressed-tensors"),
        "reference_bytes": kept,
        "records": [slim(record) for record in records],
        "cost": {spec["label"]: cost(spec, data, store, given) for spec in timed},
    }
    (work / f"{given.name}.kld.json").write_text(json.dumps(found, indent=1) + "\n")


def _picture(work: Path, name: str, look: str) -> Path:
    return work / f"{name}-{look}.png"


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a record, and what a reader would check."""
    found = {name: record[name] for name in FACTS}
    against = record["against_reference"]
    found["error"] = None if record["error"] is None else record["error"]["message"]
    found["metrics"] = None if against is None else against["metrics"]
    found["versions"] = record["identity"].get("versions")
    return found


def cost(spec: dict[str, Any], data: Path, store: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second with and without, and memory above the loaded model."""
    engine = spec["load_fn"]
    script = Path(__file__).parents[1] / "divergence_side.py"
    found: dict[str, Any] = {"tokens_per_second": {}, "peak_mib_above_loaded": {}}
    for only in ("plain", "kld") if engine == "vllm" else (None,):
        out = given.work / "side.json"
        command = [given.python.get(engine, sys.executable), str(script), "--load-fn", engine]
        command += ["--model", spec["model_dir"], "--data", str(data), "--store", str(store)]
        command += ["--passes", str(given.passes), "--out", str(out), *(["--only", only] if only else [])]
        subprocess.run(command, check=True, cwd=given.work, env=dict(os.environ))
        said = json.loads(out.read_text())
        for name in ("tokens_per_second", "peak_mib_above_loaded"):
            found[name] |= said[name]
    speed = found["tokens_per_second"]
    return found | {"engine": engine, "ratio": speed["plain"] / speed["kld"]}


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown of one model."""
    gpus = found["hardware"]["gpus"]
    device = gpus[0]["name"] if gpus else found["hardware"]["cpu"]
    lines = [
        f"### {found['name']}",
        "",
        f"One {device}, WikiText-2, {found['windows']} windows of {found['window_tokens']} tokens. The rows "
        f"of the reference take {found['reference_bytes'] / 1e6:.0f} MB. Weights are rounded to nearest, not "
        "calibrated; EXL3 calibrates.",
        "",
        "| model | bpw | PPL | KLD ± | 99.9 % | same top | acceptance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in found["records"]:
        if record["error"] is not None:
            lines.append(f"| {record['label']} | not scored: {record['error']} | | | | | |")
            continue
        head = f"| {record['label']} | {record['layer_bpw']:.3f} | {record['ppl']:.4f} |"
        metrics = record["metrics"]
        if metrics is None:
            lines.append(f"{head} the reference | | | |")
            continue
        value = {name: metrics[name]["value"] for name in ("kld", "kld_p99_9", "same_top", "acceptance")}
        lines.append(
            f"{head} {value['kld']:.5f} ± {metrics['kld']['stderr']:.5f} | {value['kld_p99_9']:.3f} "
            f"| {value['same_top']:.2%} | {value['acceptance']:.2%} |"
        )
    lines += [
        "",
        "| scoring | tok/s without | with KLD | times the time | limit |",
        "|---|---:|---:|---:|---|",
    ]
    for label, row in found["cost"].items():
        speed, limit = row["tokens_per_second"], LIMITS[row["engine"]]
        met = "met" if row["ratio"] <= limit else "**not met**"
        lines.append(
            f"| {label} | {speed['plain']:,.0f} | {speed['kld']:,.0f} | {row['ratio']:.2f} | {limit}: {met} |"
        )
    return [*lines, ""]


def document(given: argparse.Namespace) -> None:
    """Keep the results of a work folder, and write the tables of all that are kept."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for file in sorted(given.work.glob("*.kld.json")) if given.work else ():
        found = json.loads(file.read_text())
        kept[found["name"]] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "divergence.md"
    body = "\n".join(line for found in kept.values() for line in tables(found))
    between = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(between.sub(lambda _: f"{MARKS[0]}\n\n{body}\n{MARKS[1]}", text), encoding="utf-8")
    for look in LOOKS if given.picture else ():
        shutil.copyfile(_picture(given.work, given.picture, look), DOCS / "images" / f"kld-{look}.png")


def main() -> None:
    """Measure, or write down what was measured."""
    parser = argparse.ArgumentParser(description="KL divergence on a GPU host")
    parser.add_argument("step", choices=("run", "document"))
    parser.add_argument("--name", help="of the model, for the tables")
    for name in ("hf", "formats", "wikitext", "work"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve())
    parser.add_argument("--python", type=json.loads, default={}, help='{"vllm": "/path/to/python"}')
    parser.add_argument("--engines", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--passes", type=int, default=5, help="of each kind that are timed")
    parser.add_argument("--picture", help="name of the run whose drawings go into docs/images")
    given = parser.parse_args()
    run(given) if given.step == "run" else document(given)


if __name__ == "__main__":
    main()
