"""What evalq did to make a checkpoint: `evalq dequantize` and `evalq merge-lora` write it beside the weights.

Weights that were quantized once do not become the original by being written as plain numbers, and neither
does a model with an adapter merged into it. Their files look like an unquantized model's; this one tells.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint.damage import corrupt
from evalq.checkpoint.shards import read_json
from evalq.files import write_json

PROVENANCE_FILE = "evalq_provenance.json"
_VERSION = 1
_STEPS_MAX = 100


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        command: "dequantize" or "merge-lora".
        source: name of the checkpoint it read, without the folders above it.
        source_digest: `evalq.checkpoint.fingerprint` of its files.
        source_format: in one line, "compressed-tensors pack-quantized INT4 group 128 symmetric".
        dequantized: how many of its weights were quantized.
        dtype: of the weights written; None for the source's own.
        adapter: name of the adapter that was merged, None for none.
        adapter_digest: of its files.
        changed: how many weights the adapter changed.
        evalq: version.
    """

    command: str
    source: str
    source_digest: str
    source_format: str
    dequantized: int
    dtype: str | None
    adapter: str | None
    adapter_digest: str | None
    changed: int
    evalq: str

    def __str__(self) -> str:
        """For a person, in one line."""
        line = f"evalq {self.command} from {self.source} ({self.source_format})"
        return line if self.adapter is None else f"{line} and the adapter {self.adapter}"


@dataclass(frozen=True)
class Provenance:
    """The commands that made a checkpoint, the first one first; at least one."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """For a person, in one line."""
        return "; then ".join(map(str, self.steps))


def provenance(path: Path) -> Provenance | None:
    """How a checkpoint was made; None where no command of evalq made it.

    Args:
        path: a checkpoint directory. A GGUF file has none.

    Raises:
        ModelError: model_corrupt, for a file of this name that evalq did not write.
    """
    file = path / PROVENANCE_FILE
    if not file.is_file():
        return None
    raw = read_json(file)
    steps = raw.get("steps")
    if raw.get("version") != _VERSION or not isinstance(steps, list) or not 0 < len(steps) <= _STEPS_MAX:
        raise corrupt(file, "is none that this version of evalq writes")
    return Provenance(tuple(_step(file, step) for step in steps))


def write_provenance(directory: Path, made: Provenance) -> None:
    """Write it beside the weights. Raises StoreError."""
    value = {"version": _VERSION, "steps": [asdict(step) for step in made.steps]}
    write_json(directory / PROVENANCE_FILE, value)


_KINDS: dict[str, tuple[type, ...]] = {
    "command": (str,), "source": (str,), "source_digest": (str,), "source_format": (str,),
    "dequantized": (int,), "dtype": (str, type(None)), "adapter": (str, type(None)),
    "adapter_digest": (str, type(None)), "changed": (int,), "evalq": (str,),
}  # fmt: skip


def _step(file: Path, raw: Any) -> Step:
    """One step, checked. Raises ModelError."""
    right = isinstance(raw, dict) and raw.keys() == _KINDS.keys()
    if not right or not all(type(raw[key]) in kinds for key, kinds in _KINDS.items()):
        raise corrupt(file, "is none that this version of evalq writes")
    return Step(**raw)
