"""Seconds that one model takes with and without KL divergence, in one process, taking turns.

    python benchmarks/divergence_side.py --load-fn hf --model DIR --data data.json --store DIR --out out.json

The store holds the reference, as `evalq compare --kld` left it. `--only plain` and `--only kld` load the
model for one of the two, for engines that are another engine with it. Loading, warm-up and work that is done
once are left out, as in evalq's own tokens per second. Memory is the most above the loaded model.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evalq.data.sources import settings_of
from evalq.data.tokens import read_stream
from evalq.data.windows import WindowPlan, plan_windows
from evalq.engine.backend import Backend, Batch, LoadedModel, LoadRequest
from evalq.engine.columns import BESIDE, DEFAULT_COLUMNS, OWN
from evalq.engine.registry import backend
from evalq.results.kept import KeptInputs, KeptReference
from evalq.spec.files import load_data_spec

MIB = 2**20
PLAIN = DEFAULT_COLUMNS
KLD = tuple(column.name for column in (*OWN, *BESIDE))


def batches(
    plan: WindowPlan, ids: np.ndarray, size: int, columns: tuple[str, ...], kept: KeptReference
) -> list[Batch]:
    """The batches of a plan, as scoring makes them."""
    prefix, found = np.asarray(plan.prefix, np.int64), []
    for group in plan.batches(size):
        windows = tuple(plan.windows[index] for index in group)
        rows = np.stack([window.ids(ids, prefix) for window in windows])
        inputs: Any = KeptInputs(kept, windows) if columns is not PLAIN else {}
        found.append(Batch(rows, windows[0].first_target(len(prefix)), columns, inputs))
    return found


def timed(engine: Backend, model: LoadedModel, work: list[Batch]) -> tuple[float, dict[str, Any]]:
    """Seconds of a pass, work that is done once left out, and its scores."""
    began, once = time.perf_counter(), model.setup_seconds
    scores = list(engine.score(model, work))
    took = time.perf_counter() - began - (model.setup_seconds - once)
    joined = {name: np.concatenate([one[name].ravel() for one in scores]) for name in scores[0]}
    return took, joined


def peaks(model: LoadedModel) -> Iterator[float]:
    """MiB above what was held when this was first asked for: on a GPU allocated, else resident."""
    read = model.peak_memory_bytes
    first = None
    while True:
        held = read() if read else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        first = held if first is None else first
        yield (held - first) / MIB


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load-fn", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--only", choices=("plain", "kld"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    stream = read_stream(next((given.store / "tokens").glob("*.safetensors")))
    kept = KeptReference(next((given.store / "references").iterdir()))
    assert stream is not None
    plan = plan_windows(settings_of(load_data_spec(given.data), stream.prefix_ids), stream.facts)
    engine = backend(given.load_fn)
    kinds = [kind for kind in ("plain", "kld") if given.only in (None, kind)]
    with_kld = "kld" in kinds
    model = engine.load(
        LoadRequest(
            path=given.model,
            window_tokens=plan.longest_tokens,
            targets_per_window=plan.most_targets,
            options=given.options,
            load_fn=given.load_fn,
            n_windows=len(plan.windows),
            n_targets=plan.n_targets,
            columns=KLD if with_kld else PLAIN,
            reference=kept.head() if with_kld else None,
        )
    )
    memory = peaks(model)
    next(memory)
    columns = {"plain": PLAIN, "kld": KLD}
    work = {kind: batches(plan, stream.ids_N, model.batch_windows, columns[kind], kept) for kind in kinds}
    peak, scores, seconds = {}, {}, {kind: [] for kind in kinds}  # type: ignore[var-annotated]
    for kind in kinds:  # plain first: a peak is never taken back
        timed(engine, model, work[kind][:1])
        _, scores[kind] = timed(engine, model, work[kind])
        peak[kind] = next(memory)
    for turn in range(given.passes):
        for kind in kinds if turn % 2 == 0 else kinds[::-1]:
            seconds[kind].append(timed(engine, model, work[kind])[0])
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    found: dict[str, Any] = {
        "seconds": seconds,
        "tokens": plan.n_targets,
        "tokens_per_second": {kind: plan.n_targets / median[kind] for kind in kinds},
        "peak_mib_above_loaded": peak,
        "device": model.device,
        "notes": model.notes,
    }
    if len(kinds) == 2:
        found["ratio"] = median["kld"] / median["plain"]
    if with_kld:
        found["kld"] = float(scores["kld"]["kld"].mean(dtype=np.float64))
    given.out.write_text(json.dumps(found))
    engine.close(model)


if __name__ == "__main__":
    main()
