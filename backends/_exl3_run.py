"""How ExLlamaV3's modules are run: batches of windows in, log-probabilities of their targets out.

The engine chooses its kernels by the number of rows it is given: with few rows it multiplies by packed
weights (and 8-bit activations), with many it unpacks them first. Short windows and short chunks are padded
here, so every token is scored by the kernels for many rows.

Axes in names: B windows, T tokens, R rows (scored positions of all windows), H hidden, V vocabulary.
Source: `exllamav3/modules/quant/exl3.py` of https://github.com/turboderp-org/exllamav3
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalq.backend import Batch

# Above exllamav3's AUTO_RECONSTRUCT_THRESHOLD (144 rows) in version 1.6.
INPUT_TOKENS_MIN = 256
CHUNK_ROWS_MIN = 128
# Columns of the head that are unpacked at once, so that a large vocabulary is never a dense matrix.
HEAD_SLICE_MIB = 12
MIB = 2**20


@dataclass
class Handle:
    """A model of exllamav3, taken apart.

    Args:
        model: the whole; its forward() ends before the head.
        body: every module but the head, in order.
        head: the output projection.
        vocab_size: columns of the head that are tokens.
        chunk_rows: rows of logits to make at once.
        streaming_device: where modules are loaded one by one; None when all are loaded.
    """

    model: Any
    body: list[Any]
    head: Any
    vocab_size: int
    chunk_rows: int
    streaming_device: Any


def _inputs(batch: Batch) -> Any:
    """Token ids [B, T-1] on the CPU, padded on the right to INPUT_TOKENS_MIN: nothing looks ahead."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(batch.ids_BT[:, :-1]))
    return torch.nn.functional.pad(ids, (0, max(0, INPUT_TOKENS_MIN - ids.shape[1])))


def resident(handle: Handle, batches: list[Batch]) -> Iterator[tuple[Any, Any]]:
    """Scores of each batch, by a model that is loaded whole."""
    import torch

    for batch in batches:
        with torch.inference_mode():
            # forward() writes into the dictionary: a fresh one for every call.
            hidden = handle.model.forward(_inputs(batch), {"attn_mode": "flash_attn_nc"})
            scores = _score(handle, hidden, batch)
            del hidden
        yield scores


def streamed(handle: Handle, batches: list[Batch]) -> Iterator[tuple[Any, Any]]:
    """Module by module over all batches. Hidden states wait in RAM, so that windows take no GPU memory."""
    import torch

    inputs = [_inputs(batch) for batch in batches]
    states: list[Any] = list(inputs)
    # What a module leaves for later ones under this key; exllamav3's own converter carries it likewise.
    kept: list[dict[str, Any]] = [{} for _ in batches]
    for module in handle.body:
        with _on_gpu(handle, module), torch.inference_mode():
            for i, ids in enumerate(inputs):
                params = {"attn_mode": "flash_attn_nc", **kept[i], "quant_preserve": kept[i]}
                handle.model.prepare_inputs(ids, params)
                params["input_ids"] = ids
                states[i] = module.forward(module.prepare_for_device(states[i], params), params).cpu()
                kept[i] = params["quant_preserve"]
    with _on_gpu(handle, handle.head):
        for i, batch in enumerate(batches):
            with torch.inference_mode():
                hidden = handle.head.prepare_for_device(states[i], {})
                states[i] = None
                scores = _score(handle, hidden, batch)
                del hidden
            yield scores


@contextlib.contextmanager
def _on_gpu(handle: Handle, module: Any) -> Iterator[None]:
    """Load one module, and take it away again."""
    import torch

    tensors = handle.model.config.stc
    device = torch.device("cpu") if module.caps.get("prefer_cpu") else handle.streaming_device
    deferred = module.can_defer_load()
    if deferred:
        tensors.begin_deferred_load()
    module.load(device)
    if deferred:
        tensors.end_deferred_load()
    try:
        yield
    finally:
        module.unload()
        tensors.release_arena()  # partly filled blocks of the loader would stay on the GPU
        tensors.close()


def _score(handle: Handle, hidden_BTH: Any, batch: Batch) -> tuple[Any, Any]:
    """Log-probability (float32) and top-1 of each target, both [B * (T-1-start)] on the GPU."""
    import torch

    targets_BS = torch.from_numpy(np.ascontiguousarray(batch.ids_BT[:, batch.start + 1 :]))
    inputs = batch.ids_BT.shape[1] - 1
    rows_RH = hidden_BTH[:, batch.start : inputs].flatten(0, 1).contiguous()
    targets_R = targets_BS.flatten().to(rows_RH.device)
    n_rows = len(targets_R)
    if n_rows < CHUNK_ROWS_MIN // 2:
        rows_RH = torch.nn.functional.pad(rows_RH, (0, 0, 0, CHUNK_ROWS_MIN // 2 - n_rows))
    logprob = torch.empty(n_rows, dtype=torch.float32, device=rows_RH.device)
    top1 = torch.empty(n_rows, dtype=torch.bool, device=rows_RH.device)
    # Chunks of one size: a short last chunk would run other kernels.
    n_chunks = math.ceil(n_rows / handle.chunk_rows)
    with _narrow_slices(rows_RH.shape[1]):
        for chunk in np.array_split(np.arange(len(rows_RH)), n_chunks):
            rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
            logits = handle.head.forward(rows_RH[rows], {"reconstruct": True}, out_dtype=torch.float)
            part = slice(rows.start, min(rows.stop, n_rows))
            logits = logits[: part.stop - part.start, : handle.vocab_size]
            best = logits.max(dim=-1)
            target = logits.gather(-1, targets_R[part, None])[:, 0]
            # In place: the chunk is the only [rows, V] tensor there is.
            log_sum = logits.sub_(best.values[:, None]).exp_().sum(dim=-1).log_()
            logprob[part] = target - best.values - log_sum
            top1[part] = best.indices == targets_R[part]
            del logits, best
    return logprob, top1


@contextlib.contextmanager
def _narrow_slices(in_features: int) -> Iterator[None]:
    """Have the engine unpack HEAD_SLICE_MIB of the head at once instead of 32768 columns."""
    from exllamav3.modules.quant import exl3 as kernels

    usual = kernels.MAX_RECONSTRUCT_SLICE_N
    columns = HEAD_SLICE_MIB * MIB // (2 * in_features) // 128 * 128
    kernels.MAX_RECONSTRUCT_SLICE_N = min(usual, max(1024, columns))
    try:
        yield
    finally:
        kernels.MAX_RECONSTRUCT_SLICE_N = usual
