"""Latency of the commands that score nothing: wall time from start to exit of the process."""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from figures import Bench, Case, Figure, within
from running import RunFailed, gguf_model, hf_model, run, write_specs

HELP_LIMIT_SECONDS = 0.3
CACHED_LIMIT_SECONDS = 3.0


def _figure(what: str, seconds: list[float], limit: float) -> Figure:
    median = statistics.median(seconds)
    return Figure(
        what=f"{what}, median of {len(seconds)}",
        evalq=f"{median:.3f} s",
        peer="",
        value=f"{median:.3f} s ({min(seconds):.3f} to {max(seconds):.3f})",
        target=f"under {limit} s",
        met=within(median, limit, at_least=False),
    )


def _help(bench: Bench) -> list[Figure]:
    """One run before the clock starts fills the file cache and writes the byte code."""
    argv: list[object] = [sys.executable, "compare.py", "--help"]
    run(bench, argv)
    seconds = [run(bench, argv)[1] for _ in range(10)]
    bench.raw.append({"command": "compare.py --help", "seconds": seconds})
    return [_figure("`compare.py --help`", seconds, HELP_LIMIT_SECONDS)]


def _cached(bench: Bench) -> list[Figure]:
    """Five models of two engines, scored first, then shown and drawn from the store."""
    bf16 = hf_model(bench)
    bf16 = {**bf16, "label": "HF BF16", "options": {**bf16["options"], "dtype": "bfloat16"}}
    models = [hf_model(bench), bf16, *(gguf_model(bench, name) for name in ("Q4_1", "Q8_0", "F16"))]
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        size = {"protocol": "exllamav3", "eval_len": 256, "eval_stride": 256, "max_rows": 4}
        data_file, model_file = write_specs(bench, folder, size, models)
        argv: list[object] = [sys.executable, "compare.py", "-d", data_file, "-m", model_file, "--offline"]
        argv += ["-p", "-o", folder / "chart.png", "--store", folder / "store"]
        run(bench, argv)
        (folder / "chart.png").unlink()
        seconds = [run(bench, argv)[1] for _ in range(5)]
        if not (folder / "chart.png").exists():
            raise RunFailed("no chart was drawn from the stored results")
    finally:
        shutil.rmtree(folder)
    bench.raw.append({"command": " ".join(bench.shown(part) for part in argv), "seconds": seconds})
    return [_figure("five cached models: table and chart", seconds, CACHED_LIMIT_SECONDS)]


CASES: dict[str, Case] = {"latency-help": _help, "latency-cached": _cached}
