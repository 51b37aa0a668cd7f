"""Four engines, one text, one chart: transformers, vLLM, exllamav3 and llama.cpp on the same windows.

    python benchmarks/shootout.py gguf --f16 F16.gguf --tokenizer CHECKPOINT --wikitext TEXT --work DIR
    python benchmarks/shootout.py draw --store DIR/store --store OTHER/store

`gguf` makes the other GGUF types from an F16 file and scores all of them; what needs a GPU is scored by
`benchmarks/gpu/vllm_truth.py score`. `draw` takes the results of several stores, checks that they measure the
same thing and that the unquantized models of all engines agree, and writes docs/results/shootout.json and
.md and docs/images/shootout-{bpw,vram}-{light,dark}.{png,svg}. It ends with 1 when they do not agree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evalq.files import read_json, write_atomic
from evalq.plots import scatter
from evalq.results.record import ResultRecord, require_comparable
from evalq.results.reference import Candidate, choose, with_reference
from evalq.results.store import Store
from evalq.show import table

ROOT = Path(__file__).parents[1]
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
EXL3_RATES = ("6.0", "5.0", "4.0", "3.0", "2.0")
# Unquantized, one for each engine; the first is what everything is compared with.
ANCHORS = ("BF16 transformers", "BF16 vLLM", "EXL3 FP16", "GGUF F16")
ANCHORS_MAX_PERCENT = 0.2
# Label in the store -> the series and the label here.
SHOWN = {
    "BF16 transformers": ("BF16", "BF16 transformers"),
    "BF16 vLLM": ("BF16", "BF16 vLLM"),
    "EXL3 FP16": ("EXL3", "EXL3 FP16"),
    "GGUF F16": ("GGUF", "GGUF F16"),
    "FP8 vLLM": ("vLLM FP8", "vLLM FP8"),
    "INT8 vLLM": ("vLLM INT8", "vLLM INT8"),
    "INT4 g128 vLLM": ("vLLM INT4", "vLLM INT4"),
    "INT4 g128 asym vLLM": ("vLLM INT4", "vLLM INT4 asym"),
    "NVFP4 A16 vLLM": ("vLLM NVFP4", "vLLM NVFP4"),
    **{f"GGUF {name}": ("GGUF", f"GGUF {name}") for name in GGUF_TYPES},
    **{f"EXL3 {rate}": ("EXL3", f"EXL3 {rate}") for rate in EXL3_RATES},
}
# 2-bit k-quants of a model this small are far off: they are named under the axes.
CHARTS: dict[scatter.Axis, dict[str, Any]] = {
    "bpw": {"max_x": 9.0, "max_y": 60},
    "vram": {"max_x": 0.3, "max_y": 60},
}
INTRODUCTION = """Written by `benchmarks/shootout.py draw`; [shootout.json](shootout.json) holds every record.
{caption}.

The model is SmolLM2-135M-Instruct, dequantized from its Q4_1 GGUF file and padded with zeros to multiples of
128, which leaves its function unchanged: EXL3 and groups of 128 need that, and k-quants need rows of 256 (768
and 1536 here; with the model's own rows of 576 most of them fall back to other types). The zeros count as
weights in every format alike. EXL3 is calibrated; all others are rounded without calibration or importance
matrix. A model this small loses far more in 4 bits than one of billions of weights does. And because its
weights come from Q4_1 blocks (16 values for each 32 weights), Q4_K finds nearly the same values again:
Q4_K_M is flattered here, Q5_K_M and Q6_K have no such luck. This shows how to compare, not which format is
best.

![Perplexity against bits per weight](../images/shootout-bpw-light.png)
![Perplexity against VRAM](../images/shootout-vram-light.png)

The points of different engines may be compared because the unquantized model scores the same in all of"""
TITLE = "SmolLM2-135M-Instruct on WikiText-2: four engines"


def gguf(arguments: argparse.Namespace) -> int:
    """Quantize and score. The exit code is that of the command line."""
    sys.path.insert(0, str(ROOT / "demo"))
    from from_gguf import requantize_gguf

    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    files = {"F16": arguments.f16}
    for name in GGUF_TYPES:
        files[name] = work / f"{name}.gguf"
        if not files[name].is_file():
            requantize_gguf(arguments.f16, files[name], name)
    data = {"dataset": "wiki2", "protocol": "exllamav3", "eval_len": 2048, "eval_stride": 512, "max_rows": 20}
    paths = {"path": str(arguments.wikitext), "tokenizer_dir": str(arguments.tokenizer)}
    models = [{"load_fn": "gguf", "label": f"GGUF {n}", "model_dir": str(f)} for n, f in files.items()]
    (work / "wiki2.json").write_text(json.dumps(data | paths))
    (work / "gguf.json").write_text(json.dumps(models))
    command = [sys.executable, "-m", "evalq", "compare", "-d", str(work / "wiki2.json"), "--offline"]
    command += ["-m", str(work / "gguf.json"), "--store", str(work / "store")]
    return subprocess.run(command, check=False).returncode


def draw(arguments: argparse.Namespace) -> int:
    """Tables and charts. 1 if an engine's unquantized model is missing or too far from the others'."""
    records = merged(arguments.store)
    anchors = {r.label: r.ppl for r in records if r.label in ANCHORS and r.ppl is not None}
    spread = 100 * (max(anchors.values()) / min(anchors.values()) - 1)
    agree = len(anchors) == len(ANCHORS) and spread <= ANCHORS_MAX_PERCENT
    stated = {"ppl": anchors, "spread_percent": spread, "spread_percent_max": ANCHORS_MAX_PERCENT}
    missing = sorted(SHOWN.keys() - {r.label for r in records})
    shown = [relabelled(record) for record in records]
    facts = {"anchors": stated, "missing": missing, "records": [r.model_dump() for r in shown]}
    results, images = ROOT / "docs" / "results", ROOT / "docs" / "images"
    write_atomic(results / "shootout.json", (json.dumps(facts, indent=1) + "\n").encode())
    write_atomic(results / "shootout.md", document(shown, stated).encode())
    # One line stands for all unquantized models: four of them would lie on top of each other.
    line = {"group": "unquantized", "label": f"unquantized in four engines, {spread:.2f}% apart"}
    points = [r for r in shown if r.label not in ANCHORS]
    points = [r.model_copy(update=line) for r in shown if r.label == ANCHORS[0]] + points
    for x, limits in CHARTS.items():
        for mode in ("light", "dark"):
            options = scatter.ChartOptions(title=TITLE, x=x, dark=mode == "dark", **limits)
            figure = scatter.draw(points, options)
            for suffix in ("png", "svg"):
                scatter.save(figure, images / f"shootout-{x}-{mode}.{suffix}")
    print(f"{len(records)} models; unquantized {spread:.3f}% apart; missing: {', '.join(missing) or 'none'}")
    return 0 if agree and not missing else 1


def merged(stores: Sequence[Path]) -> list[ResultRecord]:
    """The records of all stores in the order of SHOWN, each compared with the first anchor.

    Raises:
        NotComparable: they measure different things.
    """
    found: dict[str, ResultRecord] = {}
    with tempfile.TemporaryDirectory() as folder:
        together = Store(Path(folder))
        (together.root / "results").mkdir()
        for store in stores:
            for result in Store(store.resolve()).results():
                try:
                    record = ResultRecord.model_validate(read_json(result.path / "record.json"))
                except ValidationError:
                    continue  # of a run that did not end
                if record.status == "ok" and record.label in SHOWN:
                    found[record.label] = record
                    (together.root / "results" / result.path.name).symlink_to(result.path)
        records = [found[label] for label in SHOWN if label in found]
        require_comparable(records)
        reference = choose([Candidate(record.label, record.layer_bpw) for record in records])
        return with_reference(records, reference, lambda record: together.result(str(record.key)).scores())


def relabelled(record: ResultRecord) -> ResultRecord:
    """The record under the names of this comparison."""
    group, label = SHOWN[record.label]
    return record.model_copy(update={"group": group, "label": label})


def document(records: Sequence[ResultRecord], anchors: dict[str, Any]) -> str:
    """docs/results/shootout.md."""
    reference = next(r.against_reference.label for r in records if r.against_reference)
    spread = f"{anchors['spread_percent']:.3f}% from the lowest to the highest"
    lines = [
        "# Four engines on the same windows",
        "",
        INTRODUCTION.format(caption=table.caption(records)),
        f"them: {_anchors(anchors['ppl'])}; that is {spread} (at most {anchors['spread_percent_max']}%).",
        "",
        f"| model | format | bpw | head bpw | GiB | PPL | against {reference} | engine | device |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    return "\n".join([*lines, *map(_row, records), "", *_notes(records)])


def _anchors(ppl: dict[str, float]) -> str:
    return ", ".join(f"{label} {value:.4f}" for label, value in ppl.items())


def _row(record: ResultRecord) -> str:
    against = record.against_reference
    change = ""
    if against is not None:
        change = f"{100 * (against.ratio - 1):+.2f} %"
        if against.ln_ratio_stderr is not None:
            change = f"{change[:-2]} ± {100 * against.ratio * against.ln_ratio_stderr:.2f} %"
    device = record.execution["device"]
    if device.startswith("cpu"):
        device = record.execution["environment"]["cpu"]
    cells = [
        record.label,
        record.format,
        f"{record.layer_bpw:.3f}",
        f"{record.head_bpw:.3f}",
        f"{record.vram_gb:.3f}",
        f"{record.ppl:.4f}",
        change,
        record.engine_version,
        device,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _notes(records: Sequence[ResultRecord]) -> list[str]:
    """What the records say about their numbers, each once with the models it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in record.notes:
            about.setdefault(note, []).append(record.label)
    return [f"- {', '.join(labels)}: {note}" for note, labels in about.items()] + [""] * bool(about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("gguf", help="make and score the GGUF files")
    for name in ("--f16", "--tokenizer", "--wikitext", "--work"):
        making.add_argument(name, type=Path, required=True)
    drawing = commands.add_parser("draw", help="write tables and charts")
    drawing.add_argument("--store", type=Path, required=True, action="append", help="may be given often")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        return draw(arguments)
    for name in ("f16", "tokenizer", "wikitext", "work"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    return gguf(arguments)


if __name__ == "__main__":
    sys.exit(main())
