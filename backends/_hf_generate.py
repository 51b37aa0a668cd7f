"""Continuing prompts in transformers: its own generate(), with its cache."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from evalq.engine.backend import Generated, Ids


def generate(model: Any, prompts: Sequence[Ids], new_tokens: int, stop_ids: frozenset[int]) -> Generated:
    """Greedy continuations.

    Prompts of different lengths are padded on the left and masked, so that all are one batch. Models with a
    state instead of a cache would take padding for text: their prompts are run in batches of one length.

    Args:
        model: a transformers model.
        prompts: as in `Backend.generate`.
        new_tokens: likewise.
        stop_ids: likewise.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    groups = [list(range(len(prompts)))]
    if getattr(model, "_is_stateful", False):
        groups = [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    found: dict[int, Ids] = {}
    first = done = 0.0
    for rows in groups if prompts else []:
        part = _batch([prompts[row] for row in rows], model, new_tokens, stop_ids)
        found |= dict(zip(rows, part.ids, strict=True))
        first, done = done + part.first_token_seconds, done + part.seconds
    return Generated([found[row] for row in range(len(prompts))], first, done)


def _batch(prompts: Sequence[Ids], model: Any, new_tokens: int, stop_ids: frozenset[int]) -> Generated:
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    longest = max(map(len, prompts))
    ids_BT = np.zeros((len(prompts), longest), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :], mask_BT[row, longest - len(prompt) :] = prompt, 1
    # The checkpoint's own (sampling, penalties, stop tokens) would fill every gap of the settings below.
    model.generation_config = GenerationConfig(pad_token_id=0)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=0,
    )
    times: list[float] = []

    class FirstToken(StoppingCriteria):  # type: ignore[misc]
        """Called after every step; never a reason to stop."""

        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            if not times:
                _synchronize(input_ids.device)
                times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    with torch.inference_mode():
        inputs = {
            "input_ids": torch.from_numpy(ids_BT).to(model.device),
            "attention_mask": torch.from_numpy(mask_BT).to(model.device),
        }
        _synchronize(model.device)
        began = time.perf_counter()
        whole = model.generate(
            **inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([FirstToken()])
        )
        new_BN = whole[:, longest:].cpu().numpy()
        seconds = time.perf_counter() - began
    ids = [_until_stop(new_N, stop_ids) for new_N in new_BN]
    return Generated(ids, times[0] - began, seconds)


def _until_stop(new_N: Ids, stop_ids: frozenset[int]) -> Ids:
    """Without what pads a continuation that ended before the others."""
    stops = np.flatnonzero(np.isin(new_N, list(stop_ids)))
    return np.array(new_N[: stops[0] + 1] if len(stops) else new_N, np.int64)


def _synchronize(device: Any) -> None:
    """Wait for what the device still has to do, so that a time is that of work done."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
