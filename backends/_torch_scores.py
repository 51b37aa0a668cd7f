"""Per-token columns from hidden states and a head, for engines that run on torch.

The head runs on scored rows only, in chunks that bound memory: a chunk of logits is the only [rows, V] tensor
there is, and everything about it is worked out in place, in float32.

Axes in names: R rows (scored positions of all windows), H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evalq.backends import _torch_divergence
from evalq.engine.columns import ARGMAX, BESIDE, ENTROPY, LOGPROB, MAX_PROB, OWN, TOP1

COLUMNS = (*OWN, *BESIDE)


def score_rows(
    logits_of: Callable[[slice], Any],
    targets_R: Any,
    chunk_rows: int,
    columns: Sequence[str],
    n_rows: int | None = None,
    reference_of: Callable[[slice], Any] | None = None,
    keep: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Columns of each row's target, tensors [R] on the targets' device.

    Args:
        logits_of: rows -> logits [rows, V], a tensor of its own that may be overwritten here.
        targets_R: int64 [R].
        chunk_rows: rows of logits to make at once.
        columns: names of COLUMNS.
        n_rows: rows that there are, R or more: what is above R is padding, and not scored.
        reference_of: rows -> the reference's logits, for columns beside it.
        keep: is given the logits of each chunk in turn, before they are overwritten.
    """
    import torch

    n_targets = len(targets_R)
    total = n_rows or n_targets
    found = {
        column.name: torch.empty(n_targets, dtype=getattr(torch, column.dtype), device=targets_R.device)
        for column in COLUMNS
        if column.name in columns
    }
    # Chunks of one size: a short last chunk would run slower and round differently.
    for chunk in np.array_split(np.arange(total), max(1, math.ceil(n_targets / chunk_rows))):
        rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
        part = slice(rows.start, min(rows.stop, n_targets))
        logits = logits_of(rows)[: part.stop - part.start]
        targets = targets_R[part]
        if keep is not None:
            keep(logits)
        if reference_of is not None:
            rows_of_out = {name: column[part] for name, column in found.items()}
            _torch_divergence.compare_rows(logits, reference_of(part), targets, columns, rows_of_out)
            continue
        logits = logits.float()
        best = logits.max(dim=-1)
        logits.sub_(best.values[:, None])
        own = logits.gather(-1, targets[:, None])[:, 0]
        # sum of p (ln p) needs the logits beside their exponentials: a second [rows, V] only for who asks.
        shifted = logits.clone() if ENTROPY.name in found else None
        total_exp = logits.exp_().sum(dim=-1)
        log_sum = total_exp.log()
        if LOGPROB.name in found:
            found[LOGPROB.name][part] = own - log_sum
        if TOP1.name in found:
            found[TOP1.name][part] = best.indices == targets
        if ARGMAX.name in found:
            found[ARGMAX.name][part] = best.indices
        if MAX_PROB.name in found:
            found[MAX_PROB.name][part] = 1 / total_exp
        if shifted is not None:
            found[ENTROPY.name][part] = (
                log_sum - shifted.mul_(logits).nan_to_num_(0.0).sum(dim=-1) / total_exp
            )
        del logits, best
    return found


def to_arrays(found: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Tensors [R] as numpy arrays [B, R / B]; what is numpy already has its shape."""
    return {
        name: column if isinstance(column, np.ndarray) else column.cpu().numpy().reshape(shape)
        for name, column in found.items()
    }


def peak_memory_fn(device: Any) -> Callable[[], int] | None:
    """Bytes allocated at most on all CUDA devices from now on; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    reset_peak_memory()
    return lambda: sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def reset_peak_memory() -> None:
    """Begin to count anew on all CUDA devices; nothing where there are none."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
