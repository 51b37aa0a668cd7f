"""Is a checkpoint what it says? Files, shapes, declared format and scales against each other.

From headers alone it takes well under a second, so it can run before every scoring; `deep` also reads the
values of the scales. Every fault is a `Finding` with the tensor it is about; faults of one kind in many
layers are one finding that counts them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from evalq.checkpoint.damage import DamagedFile
from evalq.checkpoint.findings import Finding
from evalq.checkpoint.headers import Checkpoint, open_checkpoint
from evalq.checkpoint.safetensors import storage_findings
from evalq.errors import ModelError
from evalq.inspect.declared import declared_findings
from evalq.inspect.lora import lora_findings
from evalq.inspect.packing import packing_findings
from evalq.inspect.scale_values import scale_value_findings
from evalq.inspect.shapes import shape_findings

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Copies of the same weights in another layout, which Mistral's repositories carry beside the shards.
_COPIES = ("consolidated", "adapter_", "original")


def check(model: Path | Checkpoint, deep: bool = False) -> list[Finding]:
    """Check a checkpoint.

    Args:
        model: a directory, a GGUF file, or headers that are read already.
        deep: read the values of the scales too, in bounded memory.

    Returns:
        The findings, errors first; a damaged file is one of them, and then the only one.

    Raises:
        ModelError: model_missing or unsafe_checkpoint, where there is no checkpoint to check.
    """
    try:
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        return _findings(checkpoint, deep)
    except DamagedFile as error:
        return [Finding(error.finding, error.path.name, error.message, "error")]


def require_sound(checkpoint: Checkpoint, ignored: bool | Sequence[str] = False) -> tuple[str, ...]:
    """Refuse to score a model whose numbers would be wrong for sure.

    Args:
        checkpoint: its headers.
        ignored: names of findings that the user wants to be scored all the same; True for all.

    Returns:
        What to note beside its result: warnings, and findings that were ignored.

    Raises:
        ModelError: model_corrupt, for the first finding that is an error and not ignored.
    """
    findings = check(checkpoint)
    is_ignored = {f.name: ignored is True or ignored is not False and f.name in ignored for f in findings}
    blocking = [f for f in findings if f.severity == "error" and not is_ignored[f.name]]
    if blocking:
        names = json.dumps(sorted({finding.name for finding in blocking}))
        remedy = (
            "evalq inspect shows all that is wrong with it; to score it all the same, its model spec takes "
            f'"ignore_findings": {names}'
        )
        raise ModelError(f"{checkpoint.name}: {blocking[0]}", "model_corrupt", remedy)
    known = {note.partition(":")[0] for note in checkpoint.storage.findings}
    return tuple(
        f"ignored, as the spec says: {finding}" if finding.severity == "error" else str(finding)
        for finding in findings
        if finding.name not in known
    )


def _findings(checkpoint: Checkpoint, deep: bool) -> list[Finding]:
    """Findings about headers that are read already."""
    findings = [*lora_findings(checkpoint), *shape_findings(checkpoint)]
    if not checkpoint.storage.disk_bytes:
        findings.append(
            Finding("no-weights", checkpoint.name, f"{checkpoint.name} holds no weights", "error")
        )
    if checkpoint.contents is not None:
        packing = list(packing_findings(checkpoint.contents))
        found = storage_findings(checkpoint.contents)
        if any(finding.name == "missing-scale" for finding in packing):
            found = [finding for finding in found if finding.name != "unknown-packing"]
        findings += [*found, *packing, *declared_findings(checkpoint), *_file_findings(checkpoint)]
        if deep and checkpoint.contents.shards is not None:
            findings += scale_value_findings(checkpoint.contents)
    return sorted(_merged(findings), key=lambda finding: finding.severity != "error")


def _merged(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first of all that differ in nothing but numbers in the tensor's name, with their count."""
    alike: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        alike[finding.name, re.sub(r"\d+", "*", finding.tensor)].append(finding)
    for first, *others in alike.values():
        more = f"; {len(others)} more like it" if others else ""
        yield replace(first, message=first.message + more)


def _file_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Shards that nothing names, shards that a number says are missing, tensors that the index leaves out."""
    assert checkpoint.contents is not None
    shards = checkpoint.contents.shards
    if shards is None:
        return
    directory, known = shards.files[0].parent, {file.name for file in shards.files}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in known and not file.name.startswith(_COPIES):
            by = "the index does not name it" if shards.index else "model.safetensors is read instead"
            message = f"{file.name} lies beside the weights and is not loaded: {by}"
            yield Finding("extra-shard", file.name, message, "warning")
    if shards.index is None:
        yield from _missing_numbers(known)
        return
    unlisted = [name for name in checkpoint.contents.tensors if name not in shards.weight_map]
    for name in unlisted:
        message = f"{name} is in {checkpoint.contents.tensors[name].file.name} and not in {shards.index.name}"
        yield Finding("unlisted-tensor", name, message, "warning")


def _missing_numbers(names: Iterable[str]) -> Iterator[Finding]:
    """Gaps in NAME-00001-of-0000N.safetensors where no index tells which shards there should be."""
    matches = [match for name in sorted(names) if (match := _NUMBERED.fullmatch(name))]
    for match in matches[:1]:
        expected = {
            f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            for number in range(1, int(match["count"]) + 1)
        }
        for name in sorted(expected - set(names)):
            yield Finding("missing-shard", name, f"{name} is not there, and the others count it", "error")
