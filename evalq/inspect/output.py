"""An inspection as text for a person, and as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evalq.checkpoint.bits import GIB
from evalq.inspect import Inspection
from evalq.inspect.layers import part_name, part_of

JSON_VERSION = 1
_MIB = 2**20
_NAMES_SHOWN = 6


def print_inspection(found: Inspection, console: Console, per_tensor: bool) -> None:
    """Everything, in the terminal's width."""
    _print_facts(found, console)
    console.print(_parts_table(found))
    for line in _unquantized_lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_engines_table(found))
    _print_findings(found, console)
    if per_tensor:
        console.print(_tensor_table(found))


def size(count: int) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / _MIB:,.2f} MiB"


def share(count: int, total: int) -> str:
    """A share in percent; a trace does not read as nothing."""
    value = 100 * count / max(total, 1)
    return f"{value:.1f}%" if value >= 0.05 else "<0.1%"


def parameters_line(found: Inspection) -> str:
    """Parameters in the usual short form, with the active ones of a mixture of experts."""
    facts = found.facts
    line = f"{_short(facts.parameters)} parameters"
    return line if facts.active_parameters is None else f"{line} ({_short(facts.active_parameters)} active)"


def _short(count: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}" if count < 100 * unit else f"{count / unit:.0f}{name}"
    return str(count)


def _print_facts(found: Inspection, console: Console) -> None:
    storage = found.checkpoint.storage
    bpw = "" if storage.layer_bpw is None else f", {storage.layer_bpw:.3f} bits per weight in the layers"
    where = f" ({found.checkpoint.commit[:12]} on the hub)" if found.checkpoint.commit else ""
    rows = [
        ("model", found.checkpoint.name + where),
        ("architecture", _architecture(found)),
        ("format", found.facts.scheme),
        ("size", f"{parameters_line(found)}, {size(storage.disk_bytes)}{bpw}"),
        ("activations", found.facts.activations),
        ("KV cache", found.facts.kv_cache),
        (
            "context",
            "not stated" if not found.facts.context_length else f"{found.facts.context_length:,} tokens",
        ),
        ("head", _head(found)),
        ("LoRA", _lora(found)),
    ]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


def _architecture(found: Inspection) -> str:
    facts = found.facts
    heads = facts.heads and f"{facts.heads} heads"
    if facts.heads and facts.kv_heads and facts.kv_heads != facts.heads:
        heads = f"{facts.heads} heads ({facts.kv_heads} for keys and values)"
    pieces = (
        facts.layers and f"{facts.layers} layers",
        facts.hidden and f"width {facts.hidden:,}",
        heads,
        facts.experts and f"{facts.experts} experts",
        facts.vocabulary and f"vocabulary {facts.vocabulary:,}",
    )
    shown = ", ".join(piece for piece in pieces if piece)
    return f"{facts.architecture or 'not stated'}{': ' if shown else ''}{shown}"


def _head(found: Inspection) -> str:
    storage = found.checkpoint.storage
    if storage.head_bpw is None:
        return "none"
    where = "tied to the embedding" if storage.tied_head else "its own tensor"
    return f"{where}, {storage.head_bpw:.3f} bits per weight"


def _lora(found: Inspection) -> str:
    lora = found.lora
    if not lora.compatible:
        return f"no ({lora.origin})"
    return f"yes, on {', '.join(lora.target_modules)} ({lora.origin})"


def _parts_table(found: Inspection) -> Table:
    total = sum(part.bytes for part in found.parts)
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("layers")
    for name in ("tensors", "weights", "bpw", "size", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("format", overflow="fold")
    for part in found.parts:
        bpw = "–" if part.bpw is None else f"{part.bpw:.3f}"
        numbers = (f"{part.tensors:,}", _short(part.weights), bpw, size(part.bytes))
        name = part_name(part.part, found.checkpoint.storage.tied_head)
        table.add_row(name, *numbers, share(part.bytes, total), escape(part.format_line))
    return table


def _unquantized_lines(found: Inspection) -> Iterator[str]:
    names = found.unquantized
    if names:
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        yield f"[bold]not quantized[/]: {escape(', '.join(names[:_NAMES_SHOWN]))}{more}"


def _engines_table(found: Inspection) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    for name in ("engine", "runs here", "LoRA", "installed", "why not, or what to know"):
        table.add_column(name, overflow="fold")
    for verdict in found.engines:
        runs = "[green]yes[/]" if verdict.runs else "[yellow]no[/]"
        why = escape("; ".join(verdict.reasons))
        table.add_row(verdict.engine, runs, verdict.adapters or "–", verdict.version or "no", why)
    return table


def _print_findings(found: Inspection, console: Console) -> None:
    for finding in found.findings:
        color = "red" if finding.severity == "error" else "yellow"
        line = f"[{color}]{finding.severity} {finding.name}[/]: {escape(finding.message)}"
        console.print(line, highlight=False, soft_wrap=True)
    if not found.findings:
        console.print("[green]consistent[/]: files, shapes and declared format agree", highlight=False)


def _tensor_table(found: Inspection) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("weight", overflow="fold")
    table.add_column("layers")
    for name in ("weights", "bpw", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("format")
    for tensor in found.checkpoint.storage.tensors:
        bpw = f"{8 * tensor.bytes / tensor.numel:.3f}" if tensor.numel else "–"
        numbers = (f"{tensor.numel:,}", bpw, f"{tensor.bytes:,}")
        table.add_row(escape(tensor.name), part_of(tensor), *numbers, escape(tensor.format))
    return table


def as_json(found: Inspection, per_tensor: bool) -> str:
    """The same as a JSON object; keys only come, they do not change their meaning within a version."""
    storage = found.checkpoint.storage
    value: dict[str, Any] = {
        "version": JSON_VERSION,
        "model": found.checkpoint.name,
        "commit": found.checkpoint.commit,
        "container": storage.container,
        **asdict(found.facts),
        "disk_bytes": storage.disk_bytes,
        "layer_bpw": storage.layer_bpw,
        "layer_bpw_true": storage.layer_bpw_true,
        "head_bpw": storage.head_bpw,
        "parts": [asdict(part) | {"bpw": part.bpw, "formats": dict(part.formats)} for part in found.parts],
        "unquantized": list(found.unquantized),
        "lora": asdict(found.lora),
        "engines": [asdict(verdict) for verdict in found.engines],
        "findings": [asdict(finding) for finding in found.findings],
    }
    if per_tensor:
        value["tensors"] = [asdict(tensor) | {"part": part_of(tensor)} for tensor in storage.tensors]
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
