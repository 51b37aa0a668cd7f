"""How ExLlamaV3's modules are run: batches of windows in, log-probabilities of their targets out.

The engine chooses its kernels by the number of rows it is given: with few rows it multiplies by packed
weights (and 8-bit activations), with many it unpacks them first. Short windows and short chunks are padded
here, so every token is scored by the kernels for many rows.

Axes in names: B windows, T tokens, R rows (scored positions of all windows), H hidden, V vocabulary.
Source: `exllamav3/modules/quant/exl3.py` of https://github.com/turboderp-org/exllamav3
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalq.backends._exl3_cache import Steps, scored_rows
from evalq.backends._exl3_generate import Generation
from evalq.backends._torch_reference import RowKeeper, TorchReference, logits_of, rows_of
from evalq.backends._torch_scores import score_rows
from evalq.engine.backend import Batch, reading_ahead
from evalq.engine.columns import REFERENCE_ROWS
from evalq.engine.reference import ReferenceHead

# Above exllamav3's AUTO_RECONSTRUCT_THRESHOLD (144 rows) in version 1.6.
INPUT_TOKENS_MIN = 256
CHUNK_ROWS_MIN = 128
# Recording a graph costs two forwards.
GRAPH_BATCHES_MIN = 5
ATTENTION = "flash_attn_nc"  # exllamav3's name for attention without a cache
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
        use_graph: whether batches of one shape may be replayed as a CUDA graph.
        notes: of the LoadedModel.
        replay: the recorded forward, None before there is one.
        replayed_kind: of the batches it is for.
        setup_seconds: spent on recording.
        kept: how the distributions are kept as a reference, None where they are not asked for.
        reference: distributions that the model is compared with, or None.
        steps: how windows go through a KV cache; None for one pass without.
        generation: how prompts are continued, None where that is not asked for.
    """

    model: Any
    body: list[Any]
    head: Any
    vocab_size: int
    chunk_rows: int
    streaming_device: Any
    use_graph: bool
    notes: list[str]
    replay: Any = None
    replayed_kind: "_Kind | None" = None
    setup_seconds: float = 0.0
    kept: ReferenceHead | None = None
    reference: TorchReference | None = None
    steps: Steps | None = None
    generation: Generation | None = None


# What batches must share to be one graph: B, T, the first target, the columns.
_Kind = tuple[int, int, int, tuple[str, ...]]


def _inputs(batch: Batch) -> Any:
    """Token ids [B, T-1] on the CPU, padded on the right to INPUT_TOKENS_MIN: nothing looks ahead."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(batch.ids_BT[:, :-1]))
    return torch.nn.functional.pad(ids, (0, max(0, INPUT_TOKENS_MIN - ids.shape[1])))


def stepped(handle: Handle, batches: list[Batch], plain: bool = False) -> Iterator[dict[str, Any]]:
    """Scores of each batch, in steps through the KV cache; `plain`: through the unquantized one beside it."""
    import torch

    steps = handle.steps
    assert steps is not None
    cache = steps.plain if plain else steps.cache
    for batch in reading_ahead(batches):
        scored = slice(batch.first_target - 1, batch.ids_BT.shape[1] - 1)
        with torch.inference_mode():
            rows_RH = scored_rows(handle.model, steps, cache, _inputs(batch), scored)
            scores = head_scores(handle, rows_RH, batch)
            del rows_RH
        yield scores


def resident(handle: Handle, batches: list[Batch]) -> Iterator[dict[str, Any]]:
    """Scores of each batch, by a model that is loaded whole."""
    import torch

    common, n_common = Counter(map(_kind, batches)).most_common(1)[0]
    for batch in reading_ahead(batches):
        kind = _kind(batch)
        with torch.inference_mode():
            if handle.replay is not None and kind == handle.replayed_kind:
                embedded = _embedded(handle, batch, {"attn_mode": ATTENTION})
                scores = handle.replay.run(embedded, *_others(handle, batch))
            else:
                # forward() writes into the dictionary: a fresh one for every call.
                hidden = handle.model.forward(_inputs(batch), {"attn_mode": ATTENTION})
                scores = head_scores(handle, _scored_rows(hidden, batch), batch)
                del hidden
                if (
                    handle.use_graph
                    and _in_graph(handle, batch)
                    and kind == common
                    and n_common >= GRAPH_BATCHES_MIN
                ):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    handle.replay = None  # at most one takes memory
                    handle.replay, handle.replayed_kind = _recorded(handle, batch, scores), kind
                    torch.cuda.synchronize()
                    handle.setup_seconds += time.perf_counter() - began
        yield scores


def _recorded(handle: Handle, batch: Batch, scores: dict[str, Any]) -> Any:
    """The forward of this batch's shape as a graph that gives the same scores, or None."""
    import torch

    from evalq.backends._exl3_graph import DIFFERENCE_MAX_NATS, record, recordable

    params = {"attn_mode": ATTENTION}
    embedded = _embedded(handle, batch, params)
    device = handle.body[-1].device
    others = tuple(other.to(device) for other in _others(handle, batch))
    whole = handle.model.fwd_modules

    def step(hidden_BTH: Any, *others: Any) -> dict[str, Any]:
        hidden_BTH = handle.model.forward_ls(hidden_BTH, {"attn_mode": ATTENTION})
        return head_scores(handle, _scored_rows(hidden_BTH, batch), batch, others)

    handle.use_graph = recordable(handle.model, [*handle.body, handle.head], params)
    if not handle.use_graph:
        return None
    handle.model.fwd_modules = whole[1:]
    try:
        replay = record(step, embedded, others, handle.body[-1].device)
        again = replay.run(embedded, *others)
        # Two NaN are no difference: what is not finite is reported with the scores.
        difference = max(
            float((again[name].float() - scores[name].float()).abs().nan_to_num(nan=0.0).max())
            for name in scores
            if scores[name].is_floating_point()
        )
        problem = f"it changes scores by {difference:.3f} nats" if difference > DIFFERENCE_MAX_NATS else ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        problem = str(error).strip().splitlines()[0]
    finally:
        handle.model.fwd_modules = whole
    if problem:
        handle.use_graph = False
        handle.notes.append(f"not run as a CUDA graph: {problem}")
        return None
    return replay


def _kind(batch: Batch) -> _Kind:
    n_windows, n_tokens = batch.ids_BT.shape
    return n_windows, n_tokens, batch.first_target, batch.columns


def _embedded(handle: Handle, batch: Batch, params: dict[str, Any]) -> Any:
    """Hidden states [B, T, H] before the first block, on the device of the embedding (often the CPU)."""
    ids = handle.model.prepare_inputs(_inputs(batch), params)
    embedding = handle.body[0]
    return embedding.forward(embedding.prepare_for_device(ids, params), params)


def streamed(handle: Handle, batches: list[Batch]) -> Iterator[dict[str, Any]]:
    """Module by module over all batches. Hidden states wait in RAM, so that windows take no GPU memory."""
    import torch

    inputs = [_inputs(batch) for batch in batches]
    states: list[Any] = list(inputs)
    # What a module leaves for later ones under this key; exllamav3's own converter carries it likewise.
    kept: list[dict[str, Any]] = [{} for _ in batches]
    for module in handle.body:
        with _on_gpu(handle, module), torch.inference_mode():
            for i, ids in enumerate(inputs):
                params = {"attn_mode": ATTENTION, **kept[i], "quant_preserve": kept[i]}
                handle.model.prepare_inputs(ids, params)
                params["input_ids"] = ids
                states[i] = module.forward(module.prepare_for_device(states[i], params), params).cpu()
                kept[i] = params["quant_preserve"]
    with _on_gpu(handle, handle.head):
        for i, batch in enumerate(batches):
            with torch.inference_mode():
                hidden = handle.head.prepare_for_device(states[i], {})
                states[i] = None
                scores = head_scores(handle, _scored_rows(hidden, batch), batch)
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
        # Out of the loader's arena, whose blocks of 128 MiB may be far larger than the module.
        tensors.begin_deferred_load(arena=False)
    module.load(device)
    if deferred:
        tensors.end_deferred_load()
    try:
        yield
    finally:
        module.unload()
        tensors.close()


def _targets(batch: Batch) -> Any:
    """Ids to score, int64 [R], on the CPU."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(batch.targets_BR)).flatten()


def _scored_rows(hidden_BTH: Any, batch: Batch) -> Any:
    """The hidden states that predict a target, [R, H]."""
    return hidden_BTH[:, batch.first_target - 1 : batch.ids_BT.shape[1] - 1].flatten(0, 1).contiguous()


def _in_graph(handle: Handle, batch: Batch) -> bool:
    """Whether everything about a batch can happen on the GPU: rows that are kept leave it."""
    reference = handle.reference
    on_gpu = reference is None or (reference.head.kind == "hidden" and not reference.streamed)
    return on_gpu and REFERENCE_ROWS not in batch.columns


def _others(handle: Handle, batch: Batch) -> tuple[Any, ...]:
    """What a batch needs beside its embedded tokens: targets [R], rows of the reference [R, d]."""
    rows_Rd = rows_of(handle.reference, batch)
    return (_targets(batch),) if rows_Rd is None else (_targets(batch), rows_Rd)


def head_logits(handle: Handle, rows_RH: Any) -> Any:
    """Float32 logits of hidden states, [R, V]."""
    import torch

    logits = handle.head.forward(rows_RH, {"reconstruct": True}, out_dtype=torch.float)
    return logits[:, : handle.vocab_size]


def head_scores(
    handle: Handle, rows_RH: Any, batch: Batch, others: tuple[Any, ...] | None = None
) -> dict[str, Any]:
    """Columns of each target, tensors [R] on the GPU; beside them what is kept of the batch, if anything.

    `others` are the inputs of a graph that stand for those of the batch.
    """
    import torch

    targets_R, *reference_rows = _others(handle, batch) if others is None else others
    targets_R = targets_R.to(rows_RH.device)
    keeper = RowKeeper(handle.kept) if REFERENCE_ROWS in batch.columns else None
    n_rows = len(targets_R)
    kept_RH = rows_RH
    if n_rows < CHUNK_ROWS_MIN // 2:
        rows_RH = torch.nn.functional.pad(rows_RH, (0, 0, 0, CHUNK_ROWS_MIN // 2 - n_rows))

    with _narrow_slices(rows_RH.shape[1]):
        scores = score_rows(
            lambda rows: head_logits(handle, rows_RH[rows]),
            targets_R,
            handle.chunk_rows,
            batch.columns,
            len(rows_RH),
            logits_of(handle.reference, *reference_rows) if reference_rows else None,
            None if keeper is None else keeper.keep_logits,
        )
    if keeper is not None:
        scores[REFERENCE_ROWS] = keeper.rows(kept_RH, batch.shape)
    return scores


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
