"""The only loop: windows -> backend -> per-token log-probabilities, kept as they come."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evalq.backend import Backend, Batch, Ids, LoadedModel, TokenScores
from evalq.data.tokens import TokenStream
from evalq.data.windows import WindowPlan
from evalq.errors import ModelError
from evalq.results.store import ResultDir

GIB = 2**30


def check_positions(max_positions: int | None, plan: WindowPlan) -> None:
    """Raise ModelError if a window has more inputs than the model has positions.

    The last token of a window is a target only, so T - 1 positions are enough.
    """
    inputs = plan.longest_tokens - 1
    if max_positions is not None and inputs > max_positions:
        raise ModelError(
            f"a window has {inputs} tokens, the model has {max_positions} positions",
            "window_too_long",
            f"set eval_len to {max_positions} or less in the data spec",
        )


def check_model(model: LoadedModel, stream: TokenStream, plan: WindowPlan) -> None:
    """Raise ModelError unless this model can be fed this stream: positions, vocabulary, tokenizer."""
    check_positions(model.max_positions, plan)
    largest = int(stream.ids_N.max())
    if largest >= model.vocab_size:
        raise ModelError(
            f"the text has token id {largest}, the model's vocabulary has {model.vocab_size}",
            "tokenizer_mismatch",
        )
    if model.tokenize is None:
        return
    mine = model.tokenize(stream.probe_text)
    theirs = list(stream.probe_ids)
    if mine != theirs:
        at = next(
            (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(mine), len(theirs)),
        )
        raise ModelError(
            f"the model's own tokenizer gives other ids than the data spec's from token {at} on: "
            f"{mine[at : at + 5]} and {theirs[at : at + 5]}",
            "tokenizer_mismatch",
        )


def score_windows(
    backend: Backend,
    model: LoadedModel,
    plan: WindowPlan,
    stream_N: Ids,
    result: ResultDir,
    emit: Callable[..., None],
) -> dict[str, Any]:
    """Score the windows that `result` does not hold yet, keeping each batch as soon as it is there.

    Args:
        backend: whose forward() is called.
        model: loaded, checked.
        plan: the windows.
        stream_N: token ids, int64 [N].
        result: where scores go; the caller holds its lock.
        emit: called with "progress", windows, tokens and seconds (of this session) after each batch.

    Returns:
        How it was carried out: device, dtype, batch_windows, notes, memory in GiB.

    Raises:
        ModelError: the backend returned something else than it should.
        StoreError: scores could not be kept.
    """
    kept = result.parts()
    done = set(kept.window.tolist())
    left = [[index for index in batch if index not in done] for batch in plan.batches(model.batch_windows)]
    left = [batch for batch in left if batch]
    prefix = np.asarray(plan.prefix, np.int64)
    n_windows, n_tokens = len(done), len(kept.logprob)
    n_scored, seconds = 0, 0.0
    memory_after_load = _resident_bytes()
    _reset_peak()
    emit("progress", windows=n_windows, of=len(plan.windows), tokens=n_tokens, scored=0, seconds=0.0)
    batches = (_batch(plan, window_ids, stream_N, prefix) for window_ids in left)
    for window_ids, (batch, scores, took) in zip(left, _timed(backend, model, batches), strict=True):
        wanted = (len(window_ids), batch.ids_BT.shape[1] - 1 - batch.start)
        if scores.logprob.shape != wanted or scores.top1.shape != wanted:
            raise ModelError(
                f"the backend returned {scores.logprob.shape} log-probabilities, not {wanted}", "engine_error"
            )
        result.write_part(window_ids, scores.logprob, scores.top1, took)
        n_windows, n_tokens = n_windows + len(window_ids), n_tokens + scores.logprob.size
        n_scored, seconds = n_scored + scores.logprob.size, seconds + took
        progress = {"windows": n_windows, "of": len(plan.windows), "tokens": n_tokens}
        emit("progress", **progress, scored=n_scored, seconds=seconds)
    peak = model.peak_memory_bytes() if model.peak_memory_bytes else _peak_bytes()
    return {
        "device": model.device,
        "dtype": model.dtype,
        "batch_windows": model.batch_windows,
        "notes": model.notes,
        "versions": model.versions,
        "memory": model.memory,
        "memory_after_load_gib": memory_after_load / GIB,
        "peak_memory_gib": peak / GIB if peak else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _batch(plan: WindowPlan, window_ids: list[int], stream_N: Ids, prefix: Ids) -> Batch:
    windows = [plan.windows[index] for index in window_ids]
    ids_BT = np.stack([window.ids(stream_N, prefix) for window in windows])
    return Batch(ids_BT, windows[0].first_target(len(prefix)) - 1)


def _timed(
    backend: Backend, model: LoadedModel, batches: Iterator[Batch]
) -> Iterator[tuple[Batch, TokenScores, float]]:
    """Each batch with its scores and the seconds the engine took for them."""
    many = getattr(backend, "forward_many", None)
    if many is None:
        for batch in batches:
            began = time.perf_counter()
            scores = backend.forward(model, batch.ids_BT, batch.start)
            yield batch, scores, time.perf_counter() - began
        return
    everything = list(batches)
    results = many(model, everything)
    for batch in everything:
        began = time.perf_counter()
        scores = next(results)
        yield batch, scores, time.perf_counter() - began


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_peak() -> None:
    """Linux only; elsewhere the peak covers loading too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
