"""Perplexity and KL divergence by position: models and engines on the same long windows of WikiText-2.

    python benchmarks/long.py run --name smollm2-cpu -m SPEC [SPEC ...] --wikitext wiki.test.raw --work DIR
    python benchmarks/long.py document

`run` scores the models of the specs with `evalq compare --protocol long --kld`: as long as the models reach
with --eval-len, as many windows as --windows says. It writes results/long-NAME.json and
images/long-NAME-{ppl,kld}-{light,dark}.png into --out (docs/ without it), and ends with 1 where a model
failed or an engine's unquantized model is too far from the reference in some bucket. Run again, it scores
only what WORK/store does not hold. `document` writes the tables of all results files into
docs/long-context.md.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evalq.engine.columns import LOGPROB
from evalq.files import write_atomic
from evalq.machine import environment
from evalq.plots import position
from evalq.plots.output import save
from evalq.results.by_position import bucket_name, own_by_position, pair_by_position
from evalq.results.metrics import Measured, TextScale
from evalq.results.paired import Pair
from evalq.results.record import ResultRecord
from evalq.results.reference import UNQUANTIZED_BPW
from evalq.results.store import Store
from evalq.results.tokens import TokenColumns
from evalq.show.numbers import change_percent

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "long-context.md"
# Between engines' unquantized models in every bucket: what their data types and kernels may do.
AGREE_MAX_PERCENT = 0.5
MACHINE = ("cpu", "cpu_threads", "ram_gib", "gpus", "system", "python", "evalq")
KEPT = (
    "label", "engine", "engine_version", "format", "layer_bpw", "ppl", "ppl_stderr", "tokens_scored",
    "tokens_per_second", "load_seconds", "peak_memory_gib", "is_reference", "by_position", "notes",
)  # fmt: skip


def measure(arguments: argparse.Namespace) -> int:
    """Score, draw, keep. 1 where a model failed or engines do not agree."""
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    records = scored(arguments, work)
    done = [record for record in records if record.status == "ok"]
    reference = next(record for record in done if record.is_reference)
    apart = apart_percent(done)
    facts = {
        "name": arguments.name,
        "title": arguments.title or arguments.name,
        "comparison": reference.comparison,
        "machine": {key: value for key, value in environment().items() if key in MACHINE},
        "reference": reference.label,
        "unquantized_apart_percent": apart,
        "errors_of_one_window": one_window_errors(done, Store(work / "store")),
        "records": [kept(record) for record in records],
    }
    file = arguments.out / "results" / f"long-{arguments.name}.json"
    write_atomic(file, (json.dumps(facts, indent=1) + "\n").encode())
    for y in ("ppl", "kld"):
        for mode in ("light", "dark"):
            options = position.PositionChart(arguments.title, y, mode == "dark")
            save(
                position.draw(records, options),
                arguments.out / "images" / f"long-{arguments.name}-{y}-{mode}.png",
            )
    print("\n".join(tables(facts)))
    return 0 if len(done) == len(records) and max(apart.values(), default=0.0) <= AGREE_MAX_PERCENT else 1


def scored(arguments: argparse.Namespace, work: Path) -> list[ResultRecord]:
    """The records of `evalq compare`; those that failed too."""
    data = {"dataset": "wiki2", "path": str(arguments.wikitext.resolve()), "protocol": "long"}
    data |= {"eval_len": arguments.eval_len, "max_rows": arguments.windows}
    if arguments.tokenizer is not None:
        data["tokenizer_dir"] = str(arguments.tokenizer.resolve())
    (work / "data.json").write_text(json.dumps(data))
    out = work / "records.json"
    command = [sys.executable, "-m", "evalq", "compare", "-d", str(work / "data.json"), "--kld", "--offline"]
    command += ["-m", *map(str, arguments.models), "--store", str(work / "store"), "--json", str(out)]
    if arguments.config is not None:
        command += ["--config", str(arguments.config.resolve())]
    out.unlink(missing_ok=True)
    code = subprocess.run(command, check=False).returncode
    if not out.is_file():
        sys.exit(code)
    return [ResultRecord.model_validate(record) for record in json.loads(out.read_text())]


def kept(record: ResultRecord) -> dict[str, Any]:
    """What the results file holds of a record: no paths."""
    plain, against = record.model_dump(), record.against_reference
    beside = None
    if against is not None:
        names = ("ln_ratio", "kld", "kld_bound", "same_top")
        beside = {name: plain["against_reference"]["metrics"].get(name) for name in names}
        beside |= {key: plain["against_reference"][key] for key in ("label", "by_position", "floor")}
    error = None if record.error is None else record.error.category
    device = str(record.execution.get("device", ""))
    return {name: plain[name] for name in KEPT} | {"device": device, "beside": beside, "error": error}


def apart_percent(records: Sequence[ResultRecord]) -> dict[str, float]:
    """Label of each other unquantized model -> its largest change of perplexity in any bucket, percent."""
    found = {}
    for record in records:
        against = record.against_reference
        if against is None or (record.layer_bpw or 0.0) < UNQUANTIZED_BPW or record.derived:
            continue
        changes = [math.expm1(at.metrics["ln_ratio"].value) for at in against.by_position]
        found[record.label] = 100 * max(map(abs, changes))
    return found


def one_window_errors(records: Sequence[ResultRecord], store: Store) -> dict[str, Any]:
    """How far apart windows are, beside the error that a single one of them shows, by bucket.

    Args:
        records: scored ones, the reference first for "nll_nats"; "ln_ratio" is of the model with the largest.
        store: that holds their columns.

    Returns:
        Quantity -> bucket -> (standard deviation of the windows' own values, root mean square of the errors
        that each shows alone); nothing with fewer than four whole windows.
    """
    base = next(record for record in records if record.is_reference)
    others = [record for record in records if record.against_reference is not None]
    if not others:
        return {}
    worst = max(others, key=lambda r: r.against_reference.ln_ratio if r.against_reference else -math.inf)
    theirs, mine = (store.result(str(record.key)).scores() for record in (base, worst))
    assert theirs is not None and mine is not None and theirs.windows is not None
    whole = np.flatnonzero(np.ptp(theirs.windows[:, :2], axis=1) == base.comparison["eval_len"])
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {"nll_nats": {}, "ln_ratio": {}}
    for window in whole if len(whole) >= 4 else ():
        table = theirs.windows[[window]]
        x, y = (_window(columns, int(window)) for columns in (theirs, mine))
        clusters = np.zeros(x.size, np.int64)
        own = own_by_position(Measured({LOGPROB.name: x}, clusters, TextScale()), table)
        pair = pair_by_position(Pair({LOGPROB.name: y}, {LOGPROB.name: x}, clusters), table)
        for name, buckets in (("nll_nats", own), ("ln_ratio", pair)):
            for at in buckets:
                one = at.metrics[name]
                found[name].setdefault(bucket_name(at), []).append((one.value, one.stderr))
    return {
        name: {
            bucket: {
                "windows": len(pairs),
                "between_windows": float(np.std([value for value, _ in pairs], ddof=1)),
                "shown_by_one": math.sqrt(float(np.mean([(error or 0.0) ** 2 for _, error in pairs]))),
            }
            for bucket, pairs in buckets_.items()
        }
        for name, buckets_ in found.items()
        if buckets_
    }


def _window(columns: TokenColumns, window: int) -> np.ndarray:
    found: np.ndarray = columns.columns[LOGPROB.name][columns.window_of == window]
    return found


# --- the page -----------------------------------------------------------------------------------------------


def document() -> int:
    """Write the tables of every results file into the page."""
    files = sorted((DOCS / "results").glob("long-*.json"))
    sections = [section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    text = PAGE.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
    body = "\n".join(line for lines in sections for line in lines)
    text, count = marks.subn(lambda found: f"{found[1]}{body}{found[2]}", text)
    assert count == 1, f"{PAGE} has one place for what was measured"
    PAGE.write_text(text, encoding="utf-8")
    return 0


def section(facts: Mapping[str, Any]) -> list[str]:
    """Markdown of one results file: heading, machine, tables, pictures."""
    machine, comparison = facts["machine"], facts["comparison"]
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus") or [])
    versions = dict.fromkeys(r["engine_version"] for r in facts["records"] if r["engine_version"])
    lines = [
        f"### {facts['title']}",
        "",
        f"WikiText-2 raw test, {comparison['windows']} windows of {comparison['eval_len']} tokens, "
        f"{comparison['tokens_scored']:,} tokens scored. {gpus or machine['cpu']}; {', '.join(versions)}. "
        f"[results/long-{facts['name']}.json](results/long-{facts['name']}.json) holds every figure with its "
        "error.",
        "",
        *tables(facts),
    ]
    for y, what in (("ppl", "Perplexity"), ("kld", "KL divergence")):
        stem = f"images/long-{facts['name']}-{y}"
        lines += [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.png">',
            f'  <img alt="{what} by position, {facts["title"]}" src="{stem}-light.png">',
            "</picture>",
            "",
        ]
    return lines


def tables(facts: Mapping[str, Any]) -> list[str]:
    """Perplexity of the reference and changes against it, KLD, and how engines agree, as Markdown."""
    reference = next(record for record in facts["records"] if record["is_reference"])
    names = [_name(at) for at in reference["by_position"]]
    others = [record for record in facts["records"] if record["beside"]]
    timed = any(record["tokens_per_second"] for record in facts["records"])
    head = ["PPL", *(["tok/s"] if timed else []), *names]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    own = [f"{at['metrics']['ppl']['value']:.4f}" for at in reference["by_position"]]
    rows = [(reference, own), *((r, [_cell(r, name, "ln_ratio") for name in names]) for r in others)]
    for record, cells in rows:
        cells = [record["label"], *([_speed(record)] if timed else []), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| KLD from {reference['label']} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for record in others:
        name = "kld" if record["beside"]["kld"] else "kld_bound"
        label = record["label"] if name == "kld" else f"{record['label']} (lower bound)"
        lines.append(f"| {label} | {' | '.join(_cell(record, bucket, name) for bucket in names)} |")
    apart = facts["unquantized_apart_percent"]
    if apart:
        listed = ", ".join(f"{label} at most {percent:.3f} %" for label, percent in apart.items())
        lines += ["", f"Unquantized models of other engines, in any bucket: {listed} from the reference."]
    return [*lines, "", *_errors(facts["errors_of_one_window"])]


def _errors(found: Mapping[str, Any]) -> list[str]:
    """What one window says of its own error, beside the spread of several."""
    if not found:
        return []
    lines = [
        "| spread of windows / error that one shows | windows | mean NLL | ln ratio |",
        "|---|---:|---:|---:|",
    ]
    for bucket, own in found["nll_nats"].items():
        cells = [
            f"{one['between_windows']:.4f} / {one['shown_by_one']:.4f}"
            for one in (own, found["ln_ratio"][bucket])
        ]
        lines.append(f"| {bucket} | {own['windows']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _name(at: Mapping[str, Any]) -> str:
    start, stop = at["start"] // 1024, at["stop"] // 1024
    return f"{start}{'k' if start else ''}-{stop}k"


def _speed(record: Mapping[str, Any]) -> str:
    return f"{record['tokens_per_second']:,.0f}" if record["tokens_per_second"] else ""


def _cell(record: Mapping[str, Any], name: str, metric: str) -> str:
    at = next((at for at in record["beside"]["by_position"] if _name(at) == name), None)
    one = None if at is None else at["metrics"].get(metric)
    if one is None:
        return ""
    if metric == "ln_ratio":
        ratio = math.exp(one["value"])
        return change_percent(ratio, None if one["stderr"] is None else ratio * one["stderr"])
    error = "" if one["stderr"] is None else f" ± {one['stderr']:.2g}"
    return f"{one['value']:.4g}{error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="score, draw, keep")
    running.add_argument("--name", required=True, help="of the results file and the pictures")
    running.add_argument("-m", "--models", nargs="+", required=True, help="as of `evalq compare -m`")
    running.add_argument("--wikitext", type=Path, required=True, help="wiki.test.raw")
    running.add_argument("--work", type=Path, required=True, help="folder for the store")
    running.add_argument("--tokenizer", type=Path, help="folder; default: the first model's")
    running.add_argument("--config", type=Path, help="an evalq.toml")
    running.add_argument("--eval-len", type=int, default=8192)
    running.add_argument("--windows", type=int, help="at most so many; default: the whole text")
    running.add_argument("--title", help="of the charts and the section")
    running.add_argument("--out", type=Path, default=DOCS, help="default: docs/")
    commands.add_parser("document", help="write the tables into docs/long-context.md")
    arguments = parser.parse_args()
    return document() if arguments.command == "document" else measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
