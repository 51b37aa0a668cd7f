"""What is in a checkpoint, from its headers: no tensor is loaded, no engine and no torch imported.

`inspect_model` gathers everything `evalq inspect` shows; `check` is the consistency check alone.
"""

from dataclasses import dataclass

from evalq.checkpoint.findings import Finding
from evalq.checkpoint.headers import Checkpoint
from evalq.checkpoint.hub import open_model
from evalq.inspect.consistency import check
from evalq.inspect.engines import Verdict, verdicts
from evalq.inspect.facts import Facts, facts_of
from evalq.inspect.layers import PartBits, parts_of, unquantized
from evalq.inspect.lora import Lora, lora_of
from evalq.machine import Machine, this_machine

__all__ = ["Finding", "Inspection", "check", "inspect_model", "inspect_checkpoint", "open_model"]


@dataclass(frozen=True)
class Inspection:
    """What there is to know about a checkpoint before it is loaded.

    Args:
        checkpoint: its headers.
        facts: architecture, size, scheme.
        parts: bytes of every kind of layer.
        unquantized: linear layers left as they were in a quantized model.
        lora: whether an adapter can go on it.
        engines: which engines can run it on this machine.
        findings: what is wrong with it.
        machine: this machine.
    """

    checkpoint: Checkpoint
    facts: Facts
    parts: tuple[PartBits, ...]
    unquantized: tuple[str, ...]
    lora: Lora
    engines: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    machine: Machine


def inspect_model(name: str, revision: str | None = None, offline: bool = False) -> Inspection:
    """Everything about a model, as `open_model` finds it. Raises ModelError."""
    return inspect_checkpoint(open_model(name, revision, offline))


def inspect_checkpoint(checkpoint: Checkpoint, deep: bool = False) -> Inspection:
    """Everything about a model whose headers are read.

    Args:
        checkpoint: from `open_model`.
        deep: check the values of the scales too.
    """
    facts, machine = facts_of(checkpoint), this_machine()
    return Inspection(
        checkpoint=checkpoint,
        facts=facts,
        parts=parts_of(checkpoint.storage),
        unquantized=unquantized(checkpoint.storage),
        lora=lora_of(checkpoint),
        engines=verdicts(checkpoint, facts, machine),
        findings=tuple(check(checkpoint, deep)),
        machine=machine,
    )
