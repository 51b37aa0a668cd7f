"""Feeds broken inputs to a reader and counts what it must never do: a traceback, a hang, or 1 GiB of memory.

A target is a function of bytes that ends normally or raises an EvalqError; everything else is a finding. The
input number i of a target follows from its name, the seed and i alone, so one that fails is repeated by

    .venv/bin/python tests/fuzz/run.py --target NAME --first i --inputs 1

The first inputs are the whole ones, unchanged. Inputs run in child processes (`fuzz.child`) that the system
ends after 5 s of CPU time for one input, and in which memory ends 1 GiB above what was there at the start.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from signal import Signals

TESTS = Path(__file__).parents[1]
CPU_SECONDS_MAX = 5.0
# Of a target that waits for something instead of computing; generous, because other processes run beside it.
WAITING_SECONDS_MAX = 60.0
MEMORY_BYTES_MAX = 2**30
# A child ends after so many inputs, so that what caches keep is not taken for what one input needs.
INPUTS_PER_CHILD = 1000

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """One reader of untrusted bytes.

    Args:
        name: unique among all targets.
        seeds: the whole inputs; called once in each child.
        run: reads one input; may raise EvalqError only. Files it makes belong in a `tempfile` folder.
        mutate: makes a broken input (`fuzz.mutators`).
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    run: Callable[[bytes], None]
    mutate: Mutator

    def input(self, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
        """The input of this number."""
        if number < len(seeds):
            return seeds[number]
        return self.mutate(random.Random(f"{self.name} {seed} {number}"), seeds)


@dataclass(frozen=True)
class Finding:
    """An input that broke its target.

    Args:
        number: of the input.
        kind: "traceback", "hang" or "over memory".
        where: exception and the line of the project that raised it, or how the child ended.
        text: the whole traceback, "" where there is none.
    """

    number: int
    kind: str
    where: str
    text: str = ""


@dataclass
class Outcome:
    """What a number of inputs did to a target.

    Args:
        target: its name.
        ended: inputs that were read.
        refused: inputs that ended in an EvalqError.
        findings: all others.
    """

    target: str
    ended: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Findings of a kind."""
        return sum(found.kind == kind for found in self.findings)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.ended + self.refused + len(self.findings)

    def summary(self) -> str:
        """Counts in one line, then every cause with the first input that shows it."""
        kinds = ((kind, self.count(kind)) for kind in ("traceback", "hang", "over memory"))
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds)
        lines = [f"{self.target}: {self.inputs} inputs, {self.ended} read, {self.refused} refused, {counts}"]
        for (kind, where), number in Counter((f.kind, f.where) for f in self.findings).most_common():
            first = next(f.number for f in self.findings if (f.kind, f.where) == (kind, where))
            lines.append(f"  {number} x {kind}: {where} (first: input {first})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Batch:
    """What one child runs.

    Args:
        file: the module of the target; children import no other.
        target: its name.
        seed: of the inputs.
        first: number of the first input.
        end: number after the last.
        cpu_seconds: for one input.
    """

    file: str
    target: str
    seed: int
    first: int
    end: int
    cpu_seconds: float


def targets_of(file: Path) -> dict[str, Target]:
    """The targets of one module by name; it has them in a tuple TARGETS."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    with warnings.catch_warnings(action="ignore"):  # of the libraries that a module imports
        spec.loader.exec_module(module)
    return {target.name: target for target in module.TARGETS}


@cache
def target_files(folder: Path = Path(__file__).parent) -> dict[str, Path]:
    """Every target of the `targets_*.py` of a folder, with its module."""
    named = [(name, path) for path in sorted(folder.glob("targets_*.py")) for name in targets_of(path)]
    if len(dict(named)) < len(named):
        raise ValueError(f"two targets have one name: {[name for name, _ in named]}")
    return dict(named)


def fuzz(
    name: str,
    inputs: int,
    first: int = 0,
    seed: int = 0,
    folder: Path = Path(__file__).parent,
    cpu_seconds: float = CPU_SECONDS_MAX,
) -> Outcome:
    """Run a target on `inputs` inputs from number `first` on."""
    outcome, following, end = Outcome(name), first, first + inputs
    with tempfile.TemporaryDirectory(prefix="evalq-fuzz-") as scratch:
        while following < end:
            last = min(end, following + INPUTS_PER_CHILD)
            batch = Batch(str(target_files(folder)[name]), name, seed, following, last, cpu_seconds)
            following = _run_child(outcome, batch, scratch)
    return outcome


def _run_child(outcome: Outcome, batch: Batch, scratch: str) -> int:
    """Run a batch and note what happened; returns the number of the input to go on with."""
    paths = [str(TESTS), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-m", "fuzz.child", json.dumps(asdict(batch))],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TMPDIR": scratch,
            "HOME": scratch,
            "EVALQ_STORE": str(Path(scratch) / "store"),
            "HF_HUB_OFFLINE": "1",
        },
        cwd=scratch,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    started = None
    for line in child.stdout.decode().splitlines():
        word, number, *rest = line.split(" ", 2)
        started = int(number) if word == "start" else None
        if word == "finding":
            outcome.findings.append(Finding(int(number), **json.loads(rest[0])))
        outcome.ended += word == "ended"
        outcome.refused += word == "refused"
    if child.returncode == 0:
        return batch.end
    if started is None:  # not an input's doing
        raise RuntimeError(f"{outcome.target}: {child.stderr.decode(errors='replace')[-2000:]}")
    outcome.findings.append(_ended_child(started, child.returncode, child.stderr))
    return started + 1


def _ended_child(number: int, returncode: int, stderr: bytes) -> Finding:
    name = Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    if name == "SIGPROF":
        return Finding(number, "hang", "CPU time")
    if name == "SIGALRM":
        return Finding(number, "hang", "waiting")
    if name == "SIGKILL":
        return Finding(number, "over memory", "ended by the system")
    return Finding(number, "traceback", name, stderr.decode(errors="replace")[-2000:])
