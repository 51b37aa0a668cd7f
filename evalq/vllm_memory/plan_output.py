"""A plan for people: the parts beside the GPU, the verdict, what would fit."""

from typing import NamedTuple

from rich.console import Console

from evalq.show.columns import MAJOR, MINOR, Column, print_columns
from evalq.show.console import say
from evalq.vllm_memory.activation import GIB, GRAPHS_COUNTED_FROM, GibRange
from evalq.vllm_memory.plan_advice import Advice, FormatPlan
from evalq.vllm_memory.plan_result import VllmPlan

_STYLES = {"fits": "green", "fits_shorter": "yellow"}


class _Line(NamedTuple):
    """A part of the GPU's memory, GiB as text; low and high are empty for what is exact."""

    name: str
    low: str
    expected: str
    high: str
    note: str


_COLUMNS: tuple[Column[_Line], ...] = (
    Column("GiB per GPU", lambda line: line.name),
    Column("low", lambda line: line.low, MAJOR, right=True),
    Column("expected", lambda line: line.expected, right=True),
    Column("high", lambda line: line.high, MAJOR, right=True),
    Column("what it is", lambda line: line.note, MINOR, folds=True),
)


def print_plan(plan: VllmPlan, advice: Advice, console: Console) -> None:
    """The table, then the verdict in one line, then what could be changed."""
    say(console, (_title(plan), "dim"))
    print_columns(_lines(plan), _COLUMNS, console)
    console.print()
    style = _STYLES.get(plan.status, "red")
    head, colon, rest = plan.verdict.partition(":")
    say(console, (head, f"bold {style}"), colon + rest)
    for line in [*_caution(plan), *_advice(plan, advice)]:
        say(console, f"  {line}")


def _title(plan: VllmPlan) -> str:
    settings = plan.settings
    version = ".".join(map(str, settings.version))
    gpus = settings.tp * settings.pp
    shared = f"{gpus} x " if gpus > 1 else ""
    layout = f", tensor parallel {settings.tp}, pipeline parallel {settings.pp}" if gpus > 1 else ""
    return (
        f"{plan.model} on {shared}{plan.gpu.name} with vLLM {version}{layout}, up to {plan.max_len:,} tokens"
    )


def _lines(plan: VllmPlan) -> list[_Line]:
    utilization = f"{plan.settings.budget_share:g}"
    rows = [
        _exact("GPU", plan.gpu.total_gib, _gpu_note(plan)),
        _exact("x utilization", plan.budget_gib, f"{utilization}: what vLLM may take"),
        _exact("- weights", plan.weights_gib, _weights_note(plan)),
        _range("- peak activation", plan.activation, _activation_note(plan)),
        _range("- non-torch", plan.non_torch, "NCCL, CUDA context"),
    ]
    counted = plan.settings.version >= GRAPHS_COUNTED_FROM
    if counted and not plan.settings.eager:
        rows.append(_range("- CUDA graphs", plan.graphs, "part of the budget since vLLM 0.21"))
    rows.append(_range("= KV cache", plan.kv_gib, _kv_note(plan)))
    return rows


def _range(name: str, values: GibRange, note: str) -> _Line:
    if values.low == values.high:
        return _exact(name, values.expected, note)
    return _Line(name, f"{values.low:.2f}", f"{values.expected:.2f}", f"{values.high:.2f}", note)


def _exact(name: str, gib: float, note: str) -> _Line:
    return _Line(name, "", f"{gib:.2f}", "", note)


def _gpu_note(plan: VllmPlan) -> str:
    if plan.gpu.source:
        return "what CUDA reports"
    return "about; pass what yours reports with --gpu-memory"


def _weights_note(plan: VllmPlan) -> str:
    weights = plan.weights
    parts = [
        (f"{weights.files / GIB:.2f} in the files", weights.files),
        (f"{weights.padding / GIB:.2f} padding", weights.padding),
        (f"{weights.rope / GIB:.2f} RoPE tables", weights.rope),
        (f"{weights.derived / GIB:.2f} MLA matrices", weights.derived),
        (f"{weights.lora / GIB:.2f} LoRA slots", weights.lora),
    ]
    text = " + ".join(name for name, size in parts if size >= 0.005 * GIB)
    offloaded = weights.total / GIB - plan.weights_gib
    return f"exact: {text}" + (f" - {offloaded:.2f} in RAM" if offloaded > 0 else "")


def _activation_note(plan: VllmPlan) -> str:
    if plan.settings.activation_gib is not None:
        return "given with --activation"
    step = plan.settings.step(plan.gpu)
    return f"estimate: {step.tokens:,} tokens at once, {step.sequences:,} sequences sampled"


def _kv_note(plan: VllmPlan) -> str:
    dtype = "FP8" if plan.settings.kv_dtype.startswith("fp8") else "16 bits"
    text = f"{plan.kv_bytes_per_token:,} bytes per token ({dtype})"
    if plan.state_bytes:
        text += f", {plan.state_bytes / 2**20:.1f} MiB of state per sequence"
    if any(group.reach for group in plan.pool.groups):
        reach = max(group.reach for group in plan.pool.groups)
        text += f", some layers keep {reach:,} tokens only"
    return text


def _caution(plan: VllmPlan) -> list[str]:
    if plan.is_certain:
        return []
    names = {
        "fits": "it fits",
        "fits_shorter": "it fits with less length",
        "no_kv_memory": "nothing is left for the KV cache",
        "does_not_load": "it does not load",
        "offload_unsupported": "offloading fails",
    }
    return [
        f"close: at the low end of the estimates {names[plan.status_best]}, at the high end "
        f"{names[plan.status_worst]}; measure once and pass --activation"
    ]


def _advice(plan: VllmPlan, advice: Advice) -> list[str]:
    lines = []
    if plan.longest:
        lines.append(f"longest sequence: {plan.longest:,} tokens")
    if not plan.fits and plan.longest:
        lines.append(f"so it starts with: --max-len {plan.longest}")
    if plan.kv_gib.expected > 0 and not plan.settings.kv_dtype.startswith("fp8"):
        lines.append("--kv-dtype fp8 holds about twice as many tokens, at some cost in accuracy")
    if advice.smallest_tp is None:
        lines.append("tensor parallel: too large for 64 of these GPUs with these settings")
    elif advice.smallest_tp != plan.settings.tp:
        lines.append(f"smallest tensor parallel that fits: --tp {advice.smallest_tp}")
    elif plan.settings.tp > 1:
        lines.append(f"tensor parallel {plan.settings.tp} is the smallest that fits")
    if advice.bits is not None:
        lines.append(f"linear layers have {advice.bits:.2f} bits per weight; {_formats(advice.formats)}")
    return lines


def _formats(formats: tuple[FormatPlan, ...]) -> str:
    """Those that fit with their weights; if none does, the one that holds most."""
    fitting = [f"{f.name} ({f.weights_gib:.2f} GiB)" for f in formats if f.fits]
    if fitting:
        return "it fits as " + ", ".join(fitting)
    best = max(formats, key=lambda f: f.longest)
    if best.longest:
        return f"none of the usual formats fits, {best.name} up to {best.longest:,} tokens"
    return "none of the usual formats fits on these GPUs"
