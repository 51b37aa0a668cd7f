"""What is in a checkpoint, from its headers: no tensor is loaded, no engine and no torch imported.

`inspect_model` gathers everything `evalq inspect` shows; `check` is the consistency check alone.
"""

from dataclasses import dataclass
from pathlib import Path

from evalq.checkpoint.findings import Finding
from evalq.checkpoint.source import Source, open_local
from evalq.errors import ModelError
from evalq.inspect.consistency import check, check_source
from evalq.inspect.engines import Verdict, verdicts
from evalq.inspect.facts import Facts, facts_of
from evalq.inspect.layers import PartBits, parts_of, unquantized
from evalq.inspect.lora import Lora, lora_of
from evalq.inspect.machine import Machine, this_machine

__all__ = ["Finding", "Inspection", "check", "inspect_model", "inspect_source", "open_model"]


@dataclass(frozen=True)
class Inspection:
    """What there is to know about a checkpoint before it is loaded.

    Args:
        source: its headers.
        facts: architecture, size, scheme.
        parts: bytes of every kind of layer.
        unquantized: linear layers left as they were in a quantized model.
        lora: whether an adapter can go on it.
        engines: which engines can run it on this machine.
        findings: what is wrong with it.
        machine: this machine.
    """

    source: Source
    facts: Facts
    parts: tuple[PartBits, ...]
    unquantized: tuple[str, ...]
    lora: Lora
    engines: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    machine: Machine


def open_model(name: str, revision: str | None = None, offline: bool = False) -> Source:
    """Find a model and read its headers.

    Args:
        name: a checkpoint directory, a GGUF file, owner/name on the hub, or owner/name/file.gguf there.
        revision: branch, tag or commit on the hub.
        offline: never use the network.

    Raises:
        ModelError: there is no such model, or a file of it is damaged.
    """
    path = Path(name).expanduser()
    if not path.exists():
        from evalq.checkpoint.hub import HUB_FILE, HUB_NAME, open_hub

        if HUB_NAME.fullmatch(name) or HUB_FILE.fullmatch(name):
            return open_hub(name, revision, offline)
        raise ModelError(f"{name}: no such file or directory, and no owner/name of the hub", "model_missing")
    return open_local(path, name)


def inspect_model(name: str, revision: str | None = None, offline: bool = False) -> Inspection:
    """Everything about a model, as `open_model` finds it. Raises ModelError."""
    return inspect_source(open_model(name, revision, offline))


def inspect_source(source: Source, deep: bool = False) -> Inspection:
    """Everything about a model whose headers are read.

    Args:
        source: from `open_model`.
        deep: check the values of the scales too.
    """
    facts, machine = facts_of(source), this_machine()
    return Inspection(
        source=source,
        facts=facts,
        parts=parts_of(source.storage),
        unquantized=unquantized(source.storage),
        lora=lora_of(source),
        engines=verdicts(source, facts, machine),
        findings=tuple(check_source(source, deep)),
        machine=machine,
    )
