"""What a benchmark measures, and where the results of earlier ones are kept.

A figure compares evalq with one peer in one number. Results live in docs/results/benchmarks-cpu.json, by the
name of the case that measured them, so that one case or one section can be measured again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """One row of the report.

    Args:
        what: what was measured, with its size.
        evalq: evalq's own number, with unit.
        peer: the peer's name and number; "" where the target is absolute.
        value: what the target speaks of, with unit.
        target: "" where a number is only reported.
        met: whether value is within target; None without a target.
        note: what a reader needs to know to trust it.
    """

    what: str
    evalq: str
    peer: str
    value: str
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Bench:
    """What every case is given.

    Args:
        models: folder with bf16/ and one GGUF file per quantization.
        text: wiki.test.raw.
        threads: CPU threads of evalq and of every peer.
        repetitions: of each speed measurement.
        work: folder for temporary stores.
        large: folder with bf16/ and Q4_K_M.gguf of a model of 1.5 billion weights; None without.
        raw: every measurement of the running case, kept beside its figures.
    """

    models: Path
    text: Path
    threads: int
    repetitions: int
    work: Path
    large: Path | None = None
    raw: list[dict[str, Any]] = field(default_factory=list)

    @property
    def hf_dir(self) -> Path:
        """The unquantized checkpoint."""
        return self.models / "bf16"

    def gguf(self, quantization: str) -> Path:
        """The one GGUF file of that type, Q8_0.gguf or NAME.Q8_0.gguf. Raises LookupError."""
        found = [p for p in sorted(self.models.glob("*.gguf")) if p.stem.split(".")[-1] == quantization]
        if len(found) != 1:
            raise LookupError(f"models/smollm2 should hold one {quantization}.gguf, has {len(found)}")
        return found[0]

    def shown(self, argument: object) -> str:
        """A part of a command line as another machine would write it."""
        text = str(argument)
        text = text.replace(str(self.text), "$EVALQ_WIKITEXT2").replace(str(self.work), "$TMP")
        if self.large is not None:
            text = text.replace(str(self.large), "$LARGE")
        return text.replace(str(self.models), "models/smollm2").replace(str(ROOT) + "/", "")


Case = Callable[[Bench], list[Figure]]


def within(value: float, limit: float, *, at_least: bool) -> bool:
    """Whether a number meets its target."""
    return value >= limit if at_least else value <= limit


def code_digest() -> str:
    """Changes with evalq, its backends and charts, and the benchmarks themselves."""
    digest = hashlib.sha256()
    folders = [ROOT / "evalq", ROOT / "backends", ROOT / "plots", ROOT / "benchmarks/peers"]
    paths = [path for folder in folders for path in folder.rglob("*")] + list((ROOT / "benchmarks").glob("*"))
    for path in sorted(paths):
        if path.suffix in (".py", ".sh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The JSON file, read at the start and written after every case."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        """Keep what the file holds, unless another machine measured it."""
        self.path = path
        self.machine = machine
        self.cases: dict[str, dict[str, Any]] = {}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["machine"].get("cpu") == machine.get("cpu"):
                self.cases = held["cases"]

    def is_current(self, name: str, code: str) -> bool:
        """Whether this very code has measured the case, without an error."""
        held = self.cases.get(name)
        return held is not None and held["code"] == code and held["error"] is None

    def keep(self, name: str, figures: list[Figure], bench: Bench, code: str, error: str | None) -> None:
        """Replace a case's results and write the file."""
        self.cases[name] = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": code,
            "error": error,
            "figures": [asdict(figure) for figure in figures],
            "measurements": bench.raw,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        document = {"machine": self.machine, "cases": self.cases}
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
