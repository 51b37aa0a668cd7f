"""A plan for people: the parts beside the GPU, the verdict, what would fit."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evalq.vllm_memory.activation import GIB, GRAPHS_COUNTED_FROM, Range
from evalq.vllm_memory.plan_advice import Advice, FormatPlan
from evalq.vllm_memory.plan_result import Plan

_STYLES = {"fits": "green", "fits_shorter": "yellow"}


def print_plan(plan: Plan, advice: Advice, console: Console) -> None:
    """The table, then the verdict in one line, then what could be changed."""
    console.print(_title(plan), style="dim", highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_footer=False)
    table.add_column("GiB per GPU")
    for name in ("low", "expected", "high"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, low, expected, high, note in _rows(plan):
        table.add_row(name, low, expected, high, escape(note))
    console.print(table)
    style = _STYLES.get(plan.status, "red")
    head, _, rest = plan.verdict.partition(":")
    console.print(f"[bold {style}]{escape(head)}[/]{':' if rest else ''}{escape(rest)}", highlight=False)
    for line in [*_caution(plan), *_advice(plan, advice)]:
        console.print(f"  {escape(line)}", highlight=False)


def _title(plan: Plan) -> str:
    settings = plan.settings
    version = ".".join(map(str, settings.version))
    gpus = settings.tp * settings.pp
    shared = f"{gpus} x " if gpus > 1 else ""
    layout = f", tensor parallel {settings.tp}, pipeline parallel {settings.pp}" if gpus > 1 else ""
    return (
        f"{plan.model} on {shared}{plan.gpu.name} with vLLM {version}{layout}, up to {plan.max_len:,} tokens"
    )


def _rows(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    utilization = f"{plan.settings.budget_share:g}"
    rows = [
        ("GPU", "", f"{plan.gpu.total_gib:.2f}", "", _gpu_note(plan)),
        ("x utilization", "", f"{plan.budget_gib:.2f}", "", f"{utilization}: what vLLM may take"),
        ("- weights", "", f"{plan.weights_gib:.2f}", "", _weights_note(plan)),
        _range("- peak activation", plan.activation, _activation_note(plan)),
        _range("- non-torch", plan.non_torch, "NCCL, CUDA context"),
    ]
    counted = plan.settings.version >= GRAPHS_COUNTED_FROM
    if counted and not plan.settings.eager:
        rows.append(_range("- CUDA graphs", plan.graphs, "part of the budget since vLLM 0.21"))
    rows.append(_range("= KV cache", plan.kv_gib, _kv_note(plan)))
    return rows


def _range(name: str, values: Range, note: str) -> tuple[str, str, str, str, str]:
    if values.low == values.high:
        return name, "", f"{values.expected:.2f}", "", note
    return name, f"{values.low:.2f}", f"{values.expected:.2f}", f"{values.high:.2f}", note


def _gpu_note(plan: Plan) -> str:
    if plan.gpu.source:
        return "what CUDA reports"
    return "about; pass what yours reports with --gpu-memory"


def _weights_note(plan: Plan) -> str:
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


def _activation_note(plan: Plan) -> str:
    if plan.settings.activation_gib is not None:
        return "given with --activation"
    step = plan.settings.step(plan.gpu)
    return f"estimate: {step.tokens:,} tokens at once, {step.sequences:,} sequences sampled"


def _kv_note(plan: Plan) -> str:
    dtype = "FP8" if plan.settings.kv_dtype.startswith("fp8") else "16 bits"
    text = f"{plan.kv_bytes_per_token:,} bytes per token ({dtype})"
    if plan.state_bytes:
        text += f", {plan.state_bytes / 2**20:.1f} MiB of state per sequence"
    if any(group.reach for group in plan.pool.groups):
        reach = max(group.reach for group in plan.pool.groups)
        text += f", some layers keep {reach:,} tokens only"
    return text


def _caution(plan: Plan) -> list[str]:
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


def _advice(plan: Plan, advice: Advice) -> list[str]:
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
