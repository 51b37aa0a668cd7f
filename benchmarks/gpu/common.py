"""What the measurements on a GPU share: windows, clocks, runs of the command line, processes of their own."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from evalq.data.tokens import read_stream

EVAL_LEN, EVAL_STRIDE, WINDOWS = 2048, 512, 20
MIB = 2**20


def windows_WT(ids: np.ndarray, stride: int = EVAL_STRIDE, count: int = WINDOWS) -> np.ndarray:
    """The first windows of the `exllamav3` protocol, int64 [W, T]."""
    starts = range(0, len(ids) - EVAL_LEN, stride)
    return np.stack([ids[a : a + EVAL_LEN] for a in list(starts)[:count]])


def measured(
    one_pass: Callable[[], np.ndarray], n_tokens: int, loaded_bytes: int, passes: int
) -> dict[str, Any]:
    """Tokens per second and peak memory above the loaded weights, of a first pass and of warm ones.

    Args:
        one_pass: scores every window once and returns the log-probabilities, nats.
        n_tokens: scored tokens of a pass.
        loaded_bytes: allocated on the GPU before the first pass.
        passes: warm ones that are timed.
    """
    import torch

    gpu = torch.cuda if torch.cuda.is_available() else None
    scores = np.empty(0)

    def timed() -> float:
        nonlocal scores
        if gpu:
            gpu.synchronize()
        began = time.perf_counter()
        scores = one_pass()
        if gpu:
            gpu.synchronize()
        return time.perf_counter() - began

    def peak_above(read: str) -> float | None:
        return (getattr(gpu, read)() - loaded_bytes) / MIB if gpu else None

    if gpu:
        gpu.reset_peak_memory_stats()
    first_seconds = timed()
    first_peak = peak_above("max_memory_allocated")
    if gpu:
        gpu.reset_peak_memory_stats()
    seconds = [timed() for _ in range(passes)]
    return {
        "ppl": math.exp(-float(np.mean(scores, dtype=np.float64))),
        "tokens_per_second": n_tokens / statistics.median(seconds),
        "tokens_per_second_best": n_tokens / min(seconds),
        "seconds": seconds,
        "first_pass_seconds": first_seconds,
        "loaded_mib": loaded_bytes / MIB,
        "peak_above_weights_mib": peak_above("max_memory_allocated"),
        "first_pass_peak_above_weights_mib": first_peak,
        "reserved_above_weights_mib": peak_above("max_memory_reserved"),
    }


def allocated_bytes() -> int:
    """What torch has allocated on the GPU now, after returning what it only keeps; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())


def write_data_spec(work: Path, wikitext: Path, tokenizer: Path, windows: int = WINDOWS) -> Path:
    """WORK/wiki2.json: WikiText-2 in the windows of this module, tokenized by one checkpoint's tokenizer."""
    data = {"dataset": "wiki2", "protocol": "exllamav3", "eval_len": EVAL_LEN, "eval_stride": EVAL_STRIDE}
    file = work / "wiki2.json"
    more = {"max_rows": windows, "path": str(wikitext), "tokenizer_dir": str(tokenizer)}
    file.write_text(json.dumps(data | more))
    return file


def start_compare(
    specs: list[dict[str, Any]], stem: str, data: Path, store: Path, *more: str
) -> tuple[Path, subprocess.Popen[bytes]]:
    """Start the command line on some models; where its records will be, and the process."""
    work = data.parent
    spec_file, out = work / f"{stem}.json", work / f"{stem}.records.json"
    spec_file.write_text(json.dumps(specs))
    command = [sys.executable, "-m", "evalq", "compare", "-d", str(data), "-m", str(spec_file)]
    command += ["--json", str(out), "--store", str(store), "--offline", "--try-anyway", "-q", *more]
    if (work / "evalq.toml").is_file():
        command += ["--config", str(work / "evalq.toml")]
    return out, subprocess.Popen(command, cwd=work)


def token_ids(store: Path) -> np.ndarray:
    """The token stream that a store's runs were scored on, int64 [N]."""
    stream = read_stream(next((store / "tokens").glob("*.safetensors")))
    assert stream is not None
    return stream.ids_N


def child(script: Path, side: str, out: Path, arguments: dict[str, Any], python: str = sys.executable) -> Any:
    """Run one side of a measurement in a process of its own: `script side --out OUT --name value ...`."""
    command = [python, str(script), side, "--out", str(out)]
    for name, value in arguments.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions; what is not installed is left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
