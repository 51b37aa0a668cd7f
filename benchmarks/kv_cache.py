"""What a quantized KV cache costs: perplexity and KL divergence of one model's caches, for docs/kv-cache.md.

    python benchmarks/kv_cache.py run --name NAME --title T --specs FILE --wikitext wiki.test.raw --work DIR
    python benchmarks/kv_cache.py agree --gguf FILE --wikitext wiki.test.raw --work DIR
    python benchmarks/kv_cache.py document --work DIR --picture NAME-0

FILE is a JSON list of model specs, each with a list of caches more; the first is the unquantized one, which
the others are compared with:

    [{"load_fn": "gguf", "label": "Q8_0", "model_dir": "Q8_0.gguf", "caches": ["fp16", "q8_0", "q4_0"]},
     {"load_fn": "exl3", "label": "EXL3", "model_dir": "exl3-4.0", "caches": ["fp16", "8", "4", "2"]}]

`run` draws DIR/NAME-N-light.png and -dark.png of each model, KL divergence against bits of its cache. `agree`
compares the perplexity of some caches with llama-perplexity's. Both leave JSON files in DIR, which `document`
keeps in docs/results/kv-cache.json; then it writes the tables between the marks of docs/kv-cache.md. Engines
in environments of their own are named in DIR/evalq.toml ([engines.vllm] python = ...).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from evalq.machine import environment

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results" / "kv-cache.json"
LOOKS = {"light": (), "dark": ("-dark",)}
MARKS = ("<!-- kv-cache begins: benchmarks/kv_cache.py -->", "<!-- kv-cache ends -->")
FACTS = (
    "label", "engine", "engine_version", "layer_bpw", "kv_cache", "kv_bits", "kv_bits_k", "kv_bits_v", "ppl",
    "ppl_stderr", "tokens_scored", "tokens_per_second", "notes", "key",
)  # fmt: skip
METRICS = ("ln_ratio", "kld", "kld_p99_9", "same_top")
# llama-perplexity's name of each cache, with how far apart its four decimals and evalq's may be, relative.
AGREED = {"fp16": "f16", "q8_0": "q8_0", "q5_0": "q5_0", "q4_0": "q4_0", "q8_0/q4_0": "q8_0/q4_0"}
SAME_PPL = 1e-4


def compare(given: argparse.Namespace, stem: str, data: dict[str, Any], specs: list[Any], *more: str) -> Any:
    """Records of some models on WikiText-2, by the command line."""
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data_file, spec_file, out = (work / f"{stem}.{name}.json" for name in ("data", "models", "records"))
    text = {"dataset": "wiki2", "path": str(given.wikitext.resolve())}
    data_file.write_text(json.dumps(text | data))
    spec_file.write_text(json.dumps(specs))
    command = [sys.executable, "-m", "evalq", "compare", "-d", str(data_file), "-m", str(spec_file)]
    command += ["--json", str(out), "--store", str(work / "store"), "--offline", "--try-anyway", *more]
    if (work / "evalq.toml").is_file():
        command += ["--config", str(work / "evalq.toml")]
    subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL, check=False)
    return json.loads(out.read_text())


def with_caches(spec: dict[str, Any], base: Path) -> list[dict[str, Any]]:
    """A model spec for each of its caches."""
    found = []
    rest = {name: value for name, value in spec.items() if name != "caches"}
    rest["model_dir"] = str((base / rest["model_dir"]).resolve())
    for i, cache in enumerate(spec["caches"]):
        options = rest.get("options", {}) | {"kv_cache": cache}
        found.append(rest | {"options": options, "reference": i == 0})
    return found


def run(given: argparse.Namespace) -> None:
    """Score and draw every model of the specs; DIR/NAME.kv.json holds what the tables need."""
    models = []
    for number, spec in enumerate(json.loads(given.specs.read_text())):
        stem = f"{given.name}-{number}"
        data = {"protocol": "gptq", "eval_len": given.length, "max_rows": given.windows}
        specs = with_caches(spec, given.specs.resolve().parent)
        for look, flags in LOOKS.items():  # the second one shows what the first one has scored
            # A float32 cache, the null control, is named below the chart.
            picture = ("-kld", "--kv-bits", "-mx", "17", "-o", f"{stem}-{look}.png", *flags)
            title = f"{spec['label']}: KV cache"
            records = compare(given, stem, data, specs, "-t", title, *picture)
        models.append({"label": spec["label"], "records": [slim(record) for record in records]})
    found = {
        "name": given.name,
        "title": given.title or given.name,
        "windows": given.windows,
        "window_tokens": given.length,
        "hardware": environment(),
        "models": models,
    }
    (given.work / f"{given.name}.kv.json").write_text(json.dumps(found, indent=1) + "\n")


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a record, and what a reader would check."""
    found = {name: record[name] for name in FACTS}
    against = record["against_reference"]
    metrics = {} if against is None else against["metrics"]
    found["error"] = None if record["error"] is None else record["error"]["message"]
    found["against"] = None if against is None else against["label"]
    found["metrics"] = {name: metrics[name] for name in METRICS if name in metrics}
    found["versions"] = record["identity"].get("versions")
    found["options"] = record["identity"].get("options")
    return found


def agree(given: argparse.Namespace) -> None:
    """Perplexities of caches by llama-perplexity and here, on the same chunks; DIR/agree.kv.json."""
    spec = {"load_fn": "gguf", "label": given.gguf.stem, "model_dir": str(given.gguf.resolve())}
    caches = given.caches.split(",")
    specs = with_caches(spec | {"caches": caches}, Path())
    data = {"protocol": "llama.cpp", "eval_len": 512, "max_rows": given.chunks, "tokenize_fn": "gguf"}
    records = compare(given, "agree", data | {"tokenizer_dir": str(given.gguf.resolve())}, specs)
    rows = []
    for cache, record in zip(caches, records, strict=True):
        k, _, v = AGREED[cache].partition("/")
        command = [str(given.binary), "-m", str(given.gguf), "-f", str(given.wikitext), "-c", "512"]
        command += ["--chunks", str(given.chunks), "-fa", "on", "-ctk", k, "-ctv", v or k]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        match = re.search(r"Final estimate: PPL = ([\d.]+)", said.stdout + said.stderr)
        assert match is not None, said.stderr[-2000:]
        rows.append({"cache": cache, "evalq": record["ppl"], "llama_perplexity": float(match[1])})
    found = {"model": given.gguf.name, "chunks": given.chunks, "rows": rows}
    (given.work / "agree.kv.json").write_text(json.dumps(found, indent=1) + "\n")


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown of one run."""
    gpus = found["hardware"]["gpus"]
    device = gpus[0]["name"] if gpus else found["hardware"]["cpu"]
    windows = f"{found['windows']} windows of {found['window_tokens']} tokens"
    lines = [f"### {found['title']}", "", f"One {device}, WikiText-2, {windows}, protocol `gptq`."]
    for model in found["models"]:
        first = model["records"][0]
        lines += [
            "",
            f"{model['label']} ({first['engine_version']}), beside its unquantized cache:",
            "",
            "| cache | bits | PPL | PPL ratio ± | KLD ± | KLD 99.9 % | same top |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(row(record) for record in model["records"]),
        ]
        notes = list(dict.fromkeys(note for record in model["records"] for note in record["notes"]))
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return [*lines, ""]


def row(record: dict[str, Any]) -> str:
    """One cache."""
    cache = record["kv_cache"] or "auto"
    if record["error"] is not None:
        return f"| {cache} | {record['kv_bits']:g} | not scored: {record['error']} | | | | |"
    head = f"| {cache} | {record['kv_bits']:g} | {record['ppl']:.4f} |"
    metrics = record["metrics"]
    if "kld" not in metrics:
        return f"{head} the reference | | | |"
    value = {name: metrics[name]["value"] for name in METRICS}
    ratio = 2.718281828459045 ** value["ln_ratio"]
    return (
        f"{head} {ratio:.4f} ± {ratio * metrics['ln_ratio']['stderr']:.4f} "
        f"| {value['kld']:.6f} ± {metrics['kld']['stderr']:.6f} | {value['kld_p99_9']:.4f} "
        f"| {value['same_top']:.2%} |"
    )


def agreement(found: dict[str, Any]) -> list[str]:
    """Markdown of the comparison with llama-perplexity."""
    lines = [
        "### Beside llama-perplexity",
        "",
        f"{found['model']}, {found['chunks']} chunks of 512, protocol `llama.cpp`; llama-perplexity of the "
        "same llama.cpp with `-fa on`, `-ctk` and `-ctv`.",
        "",
        "| cache | evalq | llama-perplexity | relative difference | target |",
        "|---|---:|---:|---:|---|",
    ]
    for one in found["rows"]:
        apart = one["evalq"] / one["llama_perplexity"] - 1
        met = "met" if abs(apart) <= SAME_PPL else "**not met**"
        lines.append(
            f"| {one['cache']} | {one['evalq']:.4f} | {one['llama_perplexity']:.4f} | {apart:+.1e} "
            f"| {SAME_PPL:g}: {met} |"
        )
    return [*lines, ""]


def document(given: argparse.Namespace) -> None:
    """Keep the results of a work folder, and write the tables of all that are kept."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}, "agreement": None}
    for file in sorted(given.work.glob("*.kv.json")):
        found = json.loads(file.read_text())
        if file.name == "agree.kv.json":
            kept["agreement"] = found
        else:
            kept["runs"][found["name"]] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    lines = [line for found in kept["runs"].values() for line in tables(found)]
    lines += [] if kept["agreement"] is None else agreement(kept["agreement"])
    page = DOCS / "kv-cache.md"
    text = page.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    body = "\n".join((MARKS[0], "", *lines, MARKS[1]))
    page.write_text(between.sub(lambda _: body, text), encoding="utf-8")
    for look in LOOKS if given.picture else ():
        picture = given.work / f"{given.picture}-{look}.png"
        shutil.copyfile(picture, DOCS / "images" / f"kv-cache-{look}.png")


def main() -> None:
    """Measure, or write down what was measured."""
    parser = argparse.ArgumentParser(description="what a quantized KV cache costs")
    parser.add_argument("step", choices=("run", "agree", "document"))
    parser.add_argument("--name", default="run", help="of the run and its files")
    parser.add_argument("--title", help="of its tables")
    for name in ("specs", "wikitext", "gguf"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--caches", default="fp16,q8_0,q4_0,q8_0/q4_0", help="for agree")
    parser.add_argument("--chunks", type=int, default=8, help="for agree")
    binary = ROOT / ".work/llama.cpp/build/bin/llama-perplexity"
    parser.add_argument("--binary", type=Path, default=binary, help="llama-perplexity")
    parser.add_argument("--picture", help="for document: NAME-N of the drawings to show")
    given = parser.parse_args()
    {"run": run, "agree": agree, "document": document}[given.step](given)


if __name__ == "__main__":
    main()
