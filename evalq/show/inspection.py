"""An inspection as text for a person, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from evalq.checkpoint.bits import GIB, TensorBits
from evalq.inspect import Inspection
from evalq.inspect.engines import Verdict
from evalq.inspect.layers import PartBits, part_name, part_of
from evalq.show.columns import MAJOR, MINOR, Column, print_columns
from evalq.show.console import say
from evalq.show.numbers import number
from evalq.show.plain import json_text

JSON_VERSION = 1
_MIB = 2**20
_NAMES_SHOWN = 6


def print_inspection(found: Inspection, console: Console, per_tensor: bool) -> None:
    """Everything, in the terminal's width."""
    _print_facts(found, console)
    console.print()
    _print_parts(found, console)
    console.print()
    if found.unquantized:
        say(console, ("not quantized", "bold"), f": {_names(found.unquantized)}")
        console.print()
    _print_engines(found, console)
    console.print()
    _print_findings(found, console)
    if per_tensor:
        console.print()
        _print_tensors(found, console)


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
    if found.checkpoint.provenance is not None:
        rows.append(("made by", str(found.checkpoint.provenance)))
    columns = [
        Column[tuple[str, str]]("", lambda row: row[0], style=lambda row: "bold"),
        Column[tuple[str, str]]("", lambda row: row[1], folds=True),
    ]
    print_columns(rows, columns, console, header=False)


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


def _print_parts(found: Inspection, console: Console) -> None:
    total = sum(part.bytes for part in found.parts)
    tied = found.checkpoint.storage.tied_head
    columns = [
        Column[PartBits]("layers", lambda part: part_name(part.part, tied)),
        Column[PartBits]("tensors", lambda part: f"{part.tensors:,}", MINOR + 1, right=True),
        Column[PartBits]("weights", lambda part: _short(part.weights), MINOR, right=True),
        Column[PartBits]("bpw", lambda part: number(part.bpw, 3), MAJOR, right=True),
        Column[PartBits]("size", lambda part: size(part.bytes), MAJOR, right=True),
        Column[PartBits]("share", lambda part: share(part.bytes, total), MINOR, right=True),
        Column[PartBits]("format", lambda part: part.format_line, MAJOR, folds=True),
    ]
    print_columns(found.parts, columns, console)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _print_engines(found: Inspection, console: Console) -> None:
    columns = [
        Column[Verdict]("engine", lambda one: one.engine),
        Column[Verdict](
            "runs here",
            lambda one: "?" if one.runs is None else "yes" if one.runs else "no",
            style=lambda one: "green" if one.runs else "yellow",
        ),
        Column[Verdict]("LoRA", lambda one: one.adapters or "–", MAJOR),
        Column[Verdict]("installed", lambda one: one.version or "no", MAJOR),
        Column[Verdict]("why not, or what to know", lambda one: "; ".join(one.reasons), MAJOR, folds=True),
    ]
    print_columns(found.engines, columns, console)


def _print_findings(found: Inspection, console: Console) -> None:
    for finding in found.findings:
        style = "red" if finding.severity == "error" else "yellow"
        say(console, (f"{finding.severity} {finding.name}", style), f": {finding.message}")
    if not found.findings:
        say(console, ("consistent", "green"), ": files, shapes and declared format agree")


def _print_tensors(found: Inspection, console: Console) -> None:
    columns = [
        Column[TensorBits]("weight", lambda tensor: tensor.name),
        Column[TensorBits]("layers", part_of, MINOR),
        Column[TensorBits]("weights", lambda tensor: f"{tensor.numel:,}", MINOR, right=True),
        Column[TensorBits](
            "bpw", lambda t: number(8 * t.bytes / t.numel if t.numel else None, 3), MAJOR, right=True
        ),
        Column[TensorBits]("bytes", lambda tensor: f"{tensor.bytes:,}", MAJOR, right=True),
        Column[TensorBits]("format", lambda tensor: tensor.format, MAJOR),
    ]
    print_columns(found.checkpoint.storage.tensors, columns, console)


def as_json(found: Inspection, per_tensor: bool) -> str:
    """The same as a JSON object; keys only come, they do not change their meaning within a version."""
    storage = found.checkpoint.storage
    made = found.checkpoint.provenance
    value: dict[str, Any] = {
        "version": JSON_VERSION,
        "model": found.checkpoint.name,
        "commit": found.checkpoint.commit,
        "container": storage.container,
        "provenance": None if made is None else [asdict(step) for step in made.steps],
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
    return json_text(value)
