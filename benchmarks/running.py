"""Runs evalq and its peers as a user would, each in a process of its own, and reads their JSON."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from figures import ROOT, Bench

LM_EVAL_PYTHON = ROOT / ".work/lm-eval/bin/python"
# Rare enough not to slow down what is measured: the list of processes costs more than their sizes.
SAMPLE_SECONDS = 0.1
SAMPLES_PER_LISTING = 5
GIB = 2**30


class RunFailed(Exception):
    """A command did not end well; the message has the end of what it said."""


@dataclass(frozen=True)
class Resident:
    """Memory of the largest process of a run, seen from outside.

    Args:
        samples: (time.monotonic() in seconds, bytes) of the process with the largest peak.
    """

    samples: list[tuple[float, int]]

    def peak_gib(self, last_seconds: float) -> float:
        """The most it held in the last seconds of its life, which leaves loading out."""
        if not self.samples:
            return 0.0
        since = self.samples[-1][0] - last_seconds
        return max(size for at, size in self.samples if at >= since) / GIB


class _Watch(threading.Thread):
    """Samples the resident size of a process and its descendants until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.by_pid: dict[int, list[tuple[float, int]]] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        family = [self.root]
        ticks = itertools.count()
        while not self.stopped.wait(SAMPLE_SECONDS):
            if next(ticks) % SAMPLES_PER_LISTING == 0:
                with contextlib.suppress(psutil.Error):
                    family = [self.root, *self.root.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.Error):
                    sample = (time.monotonic(), process.memory_info().rss)
                    self.by_pid.setdefault(process.pid, []).append(sample)

    def largest(self) -> Resident:
        self.stopped.set()
        self.join()
        histories = self.by_pid.values()
        return Resident(max(histories, key=lambda samples: max(s for _, s in samples), default=[]))


def run(bench: Bench, argv: list[object], accept: tuple[int, ...] = (0,)) -> tuple[str, float, Resident]:
    """Run a command at the repository's root.

    Returns:
        Its standard output, the seconds it took, and its memory.

    Raises:
        RunFailed: an exit code that is not accepted.
    """
    command = [str(part) for part in argv]
    threads = str(bench.threads)
    environment = dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, HF_HUB_OFFLINE="1")
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        watch = _Watch(process.pid)
        watch.start()
        try:
            output, _ = process.communicate()
        finally:
            process.kill()
        seconds = time.monotonic() - began
        resident = watch.largest()
        errors.seek(0)
        said = errors.read()
    if process.returncode not in accept:
        shown = " ".join(bench.shown(part) for part in command)
        raise RunFailed(f"{shown} ended with {process.returncode}: {said.strip()[-1500:]}")
    return output, seconds, resident


def peer(bench: Bench, script: str, *arguments: object) -> dict[str, Any]:
    """Run a script of benchmarks/peers/ and read the JSON object it prints. Raises RunFailed."""
    python = LM_EVAL_PYTHON if script == "lm_eval_wikitext" else Path(sys.executable)
    if not python.exists():
        raise RunFailed(f"{python} does not exist: bash benchmarks/peers/make_lm_eval_env.sh")
    argv: list[object] = [python, f"benchmarks/peers/{script}.py", *arguments]
    argv += ["--text", bench.text, "--threads", bench.threads]
    output, _, _ = run(bench, argv)
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    bench.raw.append({"command": " ".join(bench.shown(part) for part in argv), **found})
    return found


@dataclass(frozen=True)
class EvalqRun:
    """One evalq record and what was seen from outside while it was made."""

    record: dict[str, Any]
    seconds: float
    outside_peak_gib: float

    @property
    def ppl(self) -> float:
        """Per token."""
        return float(self.record["ppl"])

    @property
    def tokens(self) -> int:
        """Scored ones."""
        return int(self.record["tokens_scored"])

    @property
    def above_load_gib(self) -> float:
        """Peak while scoring minus what was resident after loading."""
        return float(self.record["peak_memory_gib"] - self.record["execution"]["memory_after_load_gib"])


def hf_model(bench: Bench) -> dict[str, Any]:
    """The unquantized checkpoint in float32, as the plain loops run it."""
    options = {"dtype": "float32", "threads": bench.threads}
    return {
        "load_fn": "hf",
        "fwd_fn": "hf",
        "label": "HF FP32",
        "model_dir": str(bench.hf_dir),
        "options": options,
    }


def gguf_model(bench: Bench, quantization: str, **options: object) -> dict[str, Any]:
    """A GGUF file with evalq's own batch sizes."""
    return {
        "load_fn": "gguf",
        "fwd_fn": "gguf",
        "label": f"GGUF {quantization}",
        "model_dir": str(bench.gguf(quantization)),
        "options": {"threads": bench.threads, **options},
    }


def write_specs(bench: Bench, folder: Path, data: dict[str, Any], models: list[dict[str, Any]]) -> list[Path]:
    """A data spec and a model spec file."""
    whole = {"dataset": "wiki2", "path": str(bench.text), **data}
    paths = [folder / "data.json", folder / "models.json"]
    for path, content in zip(paths, (whole, models), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def evalq(bench: Bench, model: dict[str, Any], **data: object) -> EvalqRun:
    """Score one model with compare.py into a new store. Raises RunFailed."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        data_file, model_file = write_specs(bench, folder, data, [model])
        out = folder / "records.json"
        argv: list[object] = [sys.executable, "compare.py", "-d", data_file, "-m", model_file]
        argv += ["--json", out, "-q", "--offline", "--store", folder / "store"]
        _, _, resident = run(bench, argv)
        record = json.loads(out.read_text(encoding="utf-8"))[0]
    finally:
        shutil.rmtree(folder)
    seconds = float(record["execution"]["seconds"])
    found = EvalqRun(record, seconds, resident.peak_gib(seconds))
    bench.raw.append(
        {
            "command": "compare.py",
            "data": data,
            "model": {name: bench.shown(value) for name, value in model.items()},
            "ppl": found.ppl,
            "tokens": found.tokens,
            "seconds": seconds,
            "tokens_per_second": record["tokens_per_second"],
            "word_ppl": record["word_ppl"],
            "windows": record["comparison"]["windows"],
            "peak_memory_gib": record["peak_memory_gib"],
            "outside_peak_gib": found.outside_peak_gib,
            "memory_after_load_gib": record["execution"]["memory_after_load_gib"],
        }
    )
    return found
