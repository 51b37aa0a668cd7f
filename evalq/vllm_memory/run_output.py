"""Runs as text, Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from textwrap import shorten
from typing import Any

from rich.console import Console

from evalq.show.columns import MAJOR, MINOR, Column, markdown_table, print_columns
from evalq.show.console import say
from evalq.show.plain import csv_cell, json_text, markdown_cell
from evalq.vllm_memory.engine_run import EngineRun, MemoryBreakdown, RunFailure

_COLOR = {"success": "green", "failed": "red", "incomplete": "yellow"}
_MESSAGE_CHARACTERS = 240


def _column(
    header: str, value: Callable[[EngineRun], float | None], digits: int, priority: int = 0
) -> Column[EngineRun]:
    return Column(header, lambda run: _number(value(run), digits), priority, right=True)


# Those above MAJOR stand in the details below the table too.
COLUMNS: tuple[Column[EngineRun], ...] = (
    Column("model", lambda run: short_name(run.engine.model)),
    Column("status", lambda run: run.category or run.status, style=lambda run: _COLOR[run.status]),
    _column("weights", lambda run: run.memory.weights_gib, 2),
    _column("peak\nact.", lambda run: run.memory.peak_activation_gib, 2, MAJOR),
    _column("non-\ntorch", lambda run: run.memory.non_torch_gib, 2, MAJOR),
    _column("graphs", lambda run: run.memory.cudagraph_gib, 2, MAJOR),
    _column("KV\ncache", lambda run: run.memory.kv_cache_gib, 2),
    _column("TP", lambda run: run.engine.tensor_parallel, 0, MINOR + 1),
    _column("max\nlen", lambda run: run.engine.max_model_len, 0, MINOR + 1),
    _column("load\ns", lambda run: run.seconds.load, 2, MINOR + 1),
    _column("KV\ntokens", lambda run: run.cache.tokens, 0, MINOR),
)


def print_runs(runs: Sequence[EngineRun], console: Console) -> None:
    """The summary, then what each run says more, then failures with what to do."""
    say(console, ("GPU memory in GiB (2**30 bytes) per GPU", "dim"))
    if not runs:
        say(console, "no engine said where its memory went: vLLM on a GPU does")
        return
    print_columns(runs, COLUMNS, console)
    console.print()
    for run in (one for one in runs if one.failure is None):
        _print_details(run, console)
    for run in (one for one in runs if one.failure is not None):
        _print_details(run, console)


def _print_details(run: EngineRun, console: Console) -> None:
    say(console, (run.engine.model, "bold"), "  ", (_origin(run), "dim"))
    for line in details(run):
        say(console, f"  {line}")
    if run.failure is not None:
        say(console, (f"  {run.failure.category}: {run.failure.meaning}", "red"))
        for line in failure_lines(run.failure):
            say(console, f"    {line}")
    if run.status == "incomplete":
        say(console, ("  the log ends before the engine is ready", "yellow"))
    for line in run.recommendations:
        say(console, f"  → {line}")
    console.print()


def short_name(model: str) -> str:
    """A hub name as it is, the last part of a path."""
    return PurePosixPath(model).name if model.count("/") != 1 else model


def details(run: EngineRun) -> list[str]:
    """What a run says beyond its row in the summary."""
    predicted = f"predicted: {_parts(run.predicted)}" if run.predicted else ""
    lines = (_engine(run), _device(run), _sum(run), predicted, _cache(run), _times(run))
    return [line for line in lines if line] + [
        f"{rank.process}: {_parts(rank.memory)}"
        for rank in (run.ranks if len(run.ranks) > 1 else ())
        if _parts(rank.memory)
    ]


def _origin(run: EngineRun) -> str:
    return f"{run.source}:{run.line}" if run.source else ""


def _engine(run: EngineRun) -> str:
    engine = run.engine
    name = f"vLLM {engine.version}" if engine.version else ""
    facts = [
        f"{name} ({engine.generation} engine)" if engine.generation == "V0" else name,
        engine.dtype or "",
        engine.quantization or "",
        f"KV cache {engine.kv_cache_dtype}" if engine.kv_cache_dtype not in (None, "auto") else "",
        run.device.kind or "",
        f"tensor parallel {engine.tensor_parallel}" if (engine.tensor_parallel or 1) > 1 else "",
        f"pipeline parallel {engine.pipeline_parallel}" if (engine.pipeline_parallel or 1) > 1 else "",
        f"data parallel {engine.data_parallel}" if (engine.data_parallel or 1) > 1 else "",
        "eager" if engine.eager else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def _device(run: EngineRun) -> str:
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


def _sum(run: EngineRun) -> str:
    """The requested memory in its parts; graphs are captured after it is shared out."""
    memory = run.memory
    parts = _parts(memory)
    whole = (memory.weights_gib, memory.peak_activation_gib, memory.non_torch_gib, memory.kv_cache_gib)
    if None in whole:
        return parts
    total = sum(part for part in whole if part is not None)
    return f"{parts}; without graphs {total:.2f}"


def _parts(memory: MemoryBreakdown) -> str:
    names = {
        "weights": memory.weights_gib,
        "peak activation": memory.peak_activation_gib,
        "non-torch": memory.non_torch_gib,
        "KV cache": memory.kv_cache_gib,
        "CUDA graphs": memory.cudagraph_gib,
    }
    return ", ".join(f"{name} {value:.2f}" for name, value in names.items() if value is not None)


def _cache(run: EngineRun) -> str:
    if run.cache.tokens is None:
        return ""
    text = f"KV cache of {run.cache.tokens:,} tokens"
    if run.cache.sequences is not None and run.engine.max_model_len:
        text += f", {run.cache.sequences:g} sequences of {run.engine.max_model_len:,}"
    return text


def _times(run: EngineRun) -> str:
    names = {
        "loading": run.seconds.load,
        "torch.compile": run.seconds.compile,
        "graph capture": run.seconds.graph_capture,
        "profile, KV cache and warm-up": run.seconds.init,
    }
    return ", ".join(f"{name} {value:.2f} s" for name, value in names.items() if value is not None)


def failure_lines(failure: RunFailure) -> list[str]:
    """The beginning of the engine's message, and the figures in it."""
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
    return [
        f"{shorten(failure.message, _MESSAGE_CHARACTERS, placeholder=' …')}{where}",
        *([shown] if shown else []),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def markdown(runs: Sequence[EngineRun]) -> str:
    """The summary for a README, then failures."""
    lines = [markdown_table(runs, COLUMNS), "GPU memory in GiB (2**30 bytes) per GPU.", ""]
    for run in runs:
        if run.failure is not None:
            said, todo = "; ".join(failure_lines(run.failure)), "; ".join(run.recommendations)
            name = markdown_cell(run.engine.model)
            lines.append(f"- {name}, {run.category}: {markdown_cell(said)}. To do: {markdown_cell(todo)}.")
    return "\n".join(lines).rstrip() + "\n"


def as_csv(runs: Sequence[EngineRun]) -> str:
    """One line per run, raw numbers; recommendations joined by "; "."""
    out = io.StringIO()
    rows = [_flat(run) for run in runs]
    names = [name for name in rows[0] if name not in ("ranks", "failure")]
    writer = csv.DictWriter(out, [*names, "error"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run, row in zip(runs, rows, strict=True):
        error = run.failure.message if run.failure else ""
        row |= {"recommendations": "; ".join(run.recommendations), "error": error}
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return out.getvalue()


def as_json(runs: Sequence[EngineRun]) -> str:
    """A list of runs."""
    return json_text([_flat(run) for run in runs])


def _flat(run: EngineRun) -> dict[str, Any]:
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
