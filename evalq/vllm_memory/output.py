"""Runs as text, Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evalq.failures import CATEGORIES
from evalq.vllm_memory.run import Breakdown, Failure, Run

HEADER = (
    "model",
    "status",
    "weights",
    "peak act.",
    "non-torch",
    "graphs",
    "KV cache",
    "TP",
    "max len",
    "load s",
    "KV tokens",
)
WIDE_COLUMNS = 110
_SAID_BELOW = ("max len", "load s", "KV tokens")
_COLOR = {"success": "green", "failed": "red", "incomplete": "yellow"}


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """The summary, then what each run says more, then failures with what to do."""
    console.print("GPU memory in GiB (2**30 bytes) per GPU", style="dim", highlight=False)
    console.print(_summary(runs, console.width))
    for run in (one for one in runs if one.failure is None):
        _print_details(run, console)
    for run in (one for one in runs if one.failure is not None):
        _print_details(run, console)


def _summary(runs: Sequence[Run], width: int) -> Table:
    """The table; a narrow terminal keeps the columns that stand nowhere else."""
    left_out = _SAID_BELOW if width < WIDE_COLUMNS else ()
    kept = [i for i, name in enumerate(HEADER) if name not in left_out]
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=20)
    for i in kept[1:]:
        right = HEADER[i] != "status"
        name = HEADER[i].replace(" ", "\n") if right else HEADER[i]
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for run in runs:
        word = run.status if left_out else run.category or run.status
        row = [escape(short_name(run.engine.model)), f"[{_COLOR[run.status]}]{word}[/]", *_cells(run)]
        table.add_row(*(row[i] for i in kept))
    return table


def _print_details(run: Run, console: Console) -> None:
    console.print(f"[bold]{escape(run.engine.model)}[/]  [dim]{escape(_origin(run))}[/]", soft_wrap=True)
    for line in details(run):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if run.failure is not None:
        meaning = CATEGORIES[run.failure.category].meaning
        console.print(f"  [red]{run.failure.category}: {meaning}[/]", highlight=False, soft_wrap=True)
        for line in failure_lines(run.failure):
            console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
    if run.status == "incomplete":
        console.print("  [yellow]the log ends before the engine is ready[/]", soft_wrap=True)
    for line in run.recommendations:
        console.print(f"  → {line}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def short_name(model: str) -> str:
    """A hub name as it is, the last part of a path."""
    return PurePosixPath(model).name if model.count("/") != 1 else model


def details(run: Run) -> list[str]:
    """What a run says beyond its row in the summary."""
    predicted = f"predicted: {_parts(run.predicted)}" if run.predicted else ""
    lines = (_engine(run), _device(run), _sum(run), predicted, _cache(run), _times(run))
    return [line for line in lines if line] + [
        f"{rank.process}: {_parts(rank.memory)}"
        for rank in (run.ranks if len(run.ranks) > 1 else ())
        if _parts(rank.memory)
    ]


def _origin(run: Run) -> str:
    return f"{run.source}:{run.line}" if run.source else ""


def _engine(run: Run) -> str:
    engine = run.engine
    name = f"vLLM {engine.version}" if engine.version else ""
    facts = [
        f"{name} ({engine.generation} engine)" if engine.generation == "V0" else name,
        engine.dtype or "",
        engine.quantization or "",
        f"KV cache {engine.kv_cache_dtype}" if engine.kv_cache_dtype not in (None, "auto") else "",
        run.device.kind or "",
        f"pipeline parallel {engine.pipeline_parallel}" if (engine.pipeline_parallel or 1) > 1 else "",
        f"data parallel {engine.data_parallel}" if (engine.data_parallel or 1) > 1 else "",
        "eager" if engine.eager else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def _device(run: Run) -> str:
    device = run.device
    if device.total_gib is None:
        return f"gpu_memory_utilization {device.utilization:g}" if device.utilization else ""
    text = f"{'NUMA node' if device.kind == 'cpu' else 'GPU'} of {device.total_gib:.2f} GiB"
    if device.free_gib is not None:
        text += f", {device.free_gib:.2f} free at the start"
    if device.requested_gib is not None:
        share = f"{device.utilization:g} = " if device.utilization else ""
        text += f"; requested {share}{device.requested_gib:.2f}"
    return text


def _sum(run: Run) -> str:
    """The requested memory in its parts; graphs are captured after it is shared out."""
    memory = run.memory
    parts = _parts(memory)
    whole = (memory.weights_gib, memory.peak_activation_gib, memory.non_torch_gib, memory.kv_cache_gib)
    if None in whole:
        return parts
    total = sum(part for part in whole if part is not None)
    return f"{parts}; without graphs {total:.2f}"


def _parts(memory: Breakdown) -> str:
    names = {
        "weights": memory.weights_gib,
        "peak activation": memory.peak_activation_gib,
        "non-torch": memory.non_torch_gib,
        "KV cache": memory.kv_cache_gib,
        "CUDA graphs": memory.cudagraph_gib,
    }
    return ", ".join(f"{name} {value:.2f}" for name, value in names.items() if value is not None)


def _cache(run: Run) -> str:
    if run.cache.tokens is None:
        return ""
    text = f"KV cache of {run.cache.tokens:,} tokens"
    if run.cache.sequences is not None and run.engine.max_model_len:
        text += f", {run.cache.sequences:g} sequences of {run.engine.max_model_len:,}"
    return text


def _times(run: Run) -> str:
    names = {
        "loading": run.seconds.load,
        "torch.compile": run.seconds.compile,
        "graph capture": run.seconds.graph_capture,
        "profile, KV cache and warm-up": run.seconds.init,
    }
    return ", ".join(f"{name} {value:.2f} s" for name, value in names.items() if value is not None)


def failure_lines(failure: Failure) -> list[str]:
    """The first of the engine's words, and the figures in them."""
    figures = {
        "tried to allocate": failure.tried_gib,
        "free": failure.free_gib,
        "in use": failure.in_use_gib,
        "of which PyTorch": failure.pytorch_gib,
        "KV cache needed for one sequence": failure.needed_gib,
        "KV cache available": failure.available_gib,
    }
    shown = ", ".join(f"{name} {value:.2f} GiB" for name, value in figures.items() if value is not None)
    where = f" (line {failure.line})" if failure.line else ""
    return [f"{shorten(failure.message, 240, placeholder=' …')}{where}", *([shown] if shown else [])]


def _cells(run: Run) -> list[str]:
    memory = run.memory
    return [
        *(_number(value, 2) for value in asdict(memory).values()),
        _number(run.engine.tensor_parallel, 0),
        _number(run.engine.max_model_len, 0),
        _number(run.seconds.load, 2),
        _number(run.cache.tokens, 0),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def markdown(runs: Sequence[Run]) -> str:
    """The summary for a README, then failures."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|" + "---:|" * (len(HEADER) - 2)]
    for run in runs:
        status = f"failed: {run.category}" if run.category else run.status
        lines.append(f"| {_cell(run.engine.model)} | {status} | {' | '.join(_cells(run))} |")
    lines += ["", "GPU memory in GiB (2**30 bytes) per GPU.", ""]
    for run in runs:
        if run.failure is not None:
            said = "; ".join(failure_lines(run.failure))
            todo = "; ".join(run.recommendations)
            lines.append(f"- {_cell(run.engine.model)}, {run.category}: {_cell(said)}. To do: {_cell(todo)}.")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(runs: Sequence[Run]) -> str:
    """One line per run, raw numbers; recommendations joined by "; "."""
    out = io.StringIO()
    rows = [_flat(run) for run in runs]
    names = [name for name in rows[0] if name not in ("ranks", "failure")]
    writer = csv.DictWriter(out, [*names, "error"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run, row in zip(runs, rows, strict=True):
        error = run.failure.message if run.failure else ""
        writer.writerow(row | {"recommendations": "; ".join(run.recommendations), "error": error})
    return out.getvalue()


def as_json(runs: Sequence[Run]) -> str:
    """A list of runs."""
    return json.dumps([_flat(run) for run in runs], indent=2, ensure_ascii=False) + "\n"


def _flat(run: Run) -> dict[str, Any]:
    engine, device = run.engine, run.device
    gpu = device.kind != "cpu"
    return {
        "model": engine.model,
        "status": run.status,
        "category": run.category,
        **asdict(run.memory),
        "kv_cache_tokens": run.cache.tokens,
        "tensor_parallel": engine.tensor_parallel,
        "max_model_len": engine.max_model_len,
        "load_seconds": run.seconds.load,
        "gpu_total_gib": device.total_gib if gpu else None,
        "utilization": device.utilization,
        "recommendations": list(run.recommendations),
        "version": engine.version,
        "engine": engine.generation,
        "device": device.kind,
        "dtype": engine.dtype,
        "quantization": engine.quantization,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "pipeline_parallel": engine.pipeline_parallel,
        "data_parallel": engine.data_parallel,
        "free_gib": device.free_gib,
        "requested_gib": device.requested_gib,
        "node_total_gib": None if gpu else device.total_gib,
        "kv_cache_memory_requested_bytes": run.cache.requested_bytes,
        "kv_cache_memory_whole_gpu_bytes": run.cache.whole_gpu_bytes,
        "concurrent_sequences": run.cache.sequences,
        "compile_seconds": run.seconds.compile,
        "graph_capture_seconds": run.seconds.graph_capture,
        "init_seconds": run.seconds.init,
        "file": run.source,
        "line": run.line,
        "failure": asdict(run.failure) if run.failure else None,
        "ranks": [asdict(rank) for rank in run.ranks],
    }
