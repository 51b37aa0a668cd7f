"""GGUF models through llama.cpp's C API (llama-cpp-python).

A batch of windows is decoded as parallel sequences in pieces of n_batch tokens that carry the KV cache on,
so the logits buffer is n_batch * V floats whatever the window. Logits are asked for at scored positions
only and read where llama.cpp wrote them. The last token of a window predicts nothing and is not decoded.
Parameters: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

import ctypes
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from evalq.backend import Ids, LoadedModel, LoadRequest, TokenScores
from evalq.backends import _llama
from evalq.backends._llama_batch import Batch, score_rows
from evalq.backends._llama_plan import OPTIONS, Plan, context_params, make_plan, model_params
from evalq.errors import ModelError

DISTRIBUTIONS = ("llama-cpp-python",)
LORA_FEATURES: frozenset[str] = frozenset()
INSTALL = 'pip install "evalq[gguf]"  # compiles llama.cpp; GPU: CMAKE_ARGS="-DGGML_CUDA=on" first'

__all__ = [
    "DISTRIBUTIONS",
    "INSTALL",
    "LORA_FEATURES",
    "OPTIONS",
    "GgufTokenizer",
    "close",
    "forward",
    "load",
    "load_tokenizer",
]

_NOTABLE_WARNING = r"missing pre-tokenizer|not supported, set to disabled|bad special token"


@dataclass
class _Handle:
    """What load() took: llama_model, llama_context, threads for the log-sum-exp."""

    path: Path
    model: Any
    context: Any
    plan: Plan
    batch: Batch
    pool: ThreadPoolExecutor | None


def load(request: LoadRequest) -> LoadedModel:
    """Load a GGUF file and size a context for the request's windows.

    Raises:
        ModelError: model_corrupt, model_missing, unsupported_format, window_too_long, oom_load, bad_option.
    """
    llama_cpp = _llama.engine()
    if request.overlay is not None:
        raise ModelError(f"a GGUF model takes no overlay ({request.overlay})", "bad_option", "remove it")
    path = _llama.first_part(request.path)
    plan = make_plan(request)
    model = _llama.open_model(path, model_params(plan, request.options))
    try:
        _check_model(model, path, plan)
        adapter = None if request.adapter is None else _llama.open_adapter(model, request.adapter)
        context = llama_cpp.llama_init_from_model(model, context_params(plan, request.options))
        if not context:
            raise _llama.failure("no context could be made", path, "engine_error")
        if adapter is not None:
            _llama.apply_adapter(context, adapter, path)
    except ModelError:
        llama_cpp.llama_model_free(model)  # and with it the adapter
        raise
    pool = ThreadPoolExecutor(plan.threads) if plan.threads > 1 else None
    return _describe(_Handle(path, model, context, plan, Batch(plan.n_batch), pool))


def forward(model: LoadedModel, ids_BT: Ids, start: int) -> TokenScores:
    """Score ids_BT[:, start+1:]; any number of rows, `batch_windows` of them at a time.

    Raises:
        ModelError: oom_forward, or engine_error in llama.cpp's own words.
    """
    handle: _Handle = model.handle
    n_rows, n_tokens = ids_BT.shape
    n_targets = max(0, n_tokens - 1 - start)
    scores = TokenScores(np.empty((n_rows, n_targets), np.float32), np.empty((n_rows, n_targets), np.bool_))
    if n_targets:
        for row in range(0, n_rows, handle.plan.batch_windows):
            rows = slice(row, row + handle.plan.batch_windows)
            _score_windows(handle, ids_BT[rows], start, TokenScores(scores.logprob[rows], scores.top1[rows]))
    return scores


def close(model: LoadedModel) -> None:
    """Free the context and the weights; a second call does nothing."""
    handle: _Handle = model.handle
    if handle.context:
        llama_cpp = _llama.engine()
        if handle.pool:
            handle.pool.shutdown()
        llama_cpp.llama_free(handle.context)
        llama_cpp.llama_model_free(handle.model)
        handle.context = handle.model = None


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer inside a GGUF file.

    Args:
        encode: (text, add_special) -> ids; add_special puts BOS and EOS as the vocabulary asks for.
        bos_id: beginning-of-text id, None when the vocabulary has none.
        eos_id: end-of-text id, None when the vocabulary has none.
        adds_bos: whether the vocabulary asks for BOS before a text.
        vocab_size: number of ids.
    """

    encode: Callable[..., list[int]]
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    vocab_size: int


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> GgufTokenizer:
    """The tokenizer of a GGUF file or of a directory that holds one, without its weights.

    Raises:
        ModelError: as load(); unsupported_format when the file holds no tokenizer.
    """
    llama_cpp = _llama.engine()
    file = _llama.first_part(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    vocabulary = _Vocabulary(_llama.open_model(file, params))
    vocab = vocabulary.vocab
    if not _llama.has_vocabulary(vocab):
        raise ModelError(f"{file.name} holds no tokenizer", "unsupported_format", "set tokenizer_dir")
    bos, eos = llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_eos(vocab)
    return GgufTokenizer(
        encode=vocabulary.encode,
        bos_id=bos if bos >= 0 else None,
        eos_id=eos if eos >= 0 else None,
        adds_bos=bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
        vocab_size=llama_cpp.llama_vocab_n_tokens(vocab),
    )


class _Vocabulary:
    """A llama_model without weights, freed when nothing refers to it (or its bound `encode`) any more."""

    def __init__(self, model: Any) -> None:
        llama_cpp = _llama.engine()
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        weakref.finalize(self, llama_cpp.llama_model_free, model)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text."""
        ids: list[int] = _llama.tokenize(self.vocab, text, add_special)
        return ids


def _check_model(model: Any, path: Path, plan: Plan) -> None:
    llama_cpp = _llama.engine()
    if not llama_cpp.llama_model_has_decoder(model) or llama_cpp.llama_model_has_encoder(model):
        raise ModelError(f"{path.name} is no decoder-only language model", "unsupported_format")
    if llama_cpp.llama_model_is_diffusion(model):
        raise ModelError(f"{path.name} is a diffusion model: no next-token order", "unsupported_format")
    limit = _max_positions(model)
    if limit is not None and plan.sequence_tokens > limit:
        raise ModelError(
            f"{path.name}: windows of {plan.sequence_tokens + 1} tokens, positions for {limit}",
            "window_too_long",
        )


def _max_positions(model: Any) -> int | None:
    llama_cpp = _llama.engine()
    if llama_cpp.llama_model_is_recurrent(model):
        return None
    limit: int = llama_cpp.llama_model_n_ctx_train(model)
    return limit or None


def _describe(handle: _Handle) -> LoadedModel:
    llama_cpp = _llama.engine()
    vocab = llama_cpp.llama_model_get_vocab(handle.model)
    text = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(handle.model, text, len(text))
    dtype = text.value.decode().split(" ", 2)[-1]  # "llama 135M Q4_K - Medium"
    device = _device(handle.plan)
    notes = [line for line in _llama.LOG.warnings() if re.search(_NOTABLE_WARNING, line)]
    if device == "cpu" and not re.search(r"F32|F16", dtype):
        notes.append("llama.cpp's CPU kernels round activations to 8 bits before quantized weights")
    features = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
    return LoadedModel(
        handle=handle,
        vocab_size=llama_cpp.llama_vocab_n_tokens(vocab),
        max_positions=_max_positions(handle.model),
        device=device,
        dtype=dtype,
        batch_windows=handle.plan.batch_windows,
        tokenize=(lambda text: _llama.tokenize(vocab, text)) if _llama.has_vocabulary(vocab) else None,
        versions={
            "llama-cpp-python": llama_cpp.__version__,
            "llama.cpp": f"{llama_cpp.llama_version().decode()} ({' '.join(features)})",
        },
        notes=notes,
    )


def _device(plan: Plan) -> str:
    """What llama.cpp says it uses, "cuda:0 NVIDIA H200", else "cpu"."""
    used = _llama.LOG.matches(r"using device (\S+?)(\d*) \((.+?)\)") if plan.n_gpu_layers else []
    names = [f"{m[1].lower()}{':' + m[2] if m[2] else ''} {m[3]}" for m in used]
    return ", ".join(names) or "cpu"


def _score_windows(handle: _Handle, ids_BT: Ids, start: int, out: TokenScores) -> None:
    """Score up to batch_windows rows into `out`, [B, T-1-start]."""
    llama_cpp = _llama.engine()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle.context), True)
    n_rows, n_tokens = ids_BT.shape
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle.model))
    for first, end in pairwise(_piece_bounds(n_tokens - 1, handle.plan)):
        _llama.LOG.clear()
        status = llama_cpp.llama_decode(handle.context, handle.batch.fill(ids_BT[:, first:end], first, start))
        if status != 0:
            raise _decode_failure(handle, status)
        scored = max(first, start)
        if scored >= end:
            continue
        shape_NV = (n_rows * (end - scored), n_vocab)
        logits_NV = np.ctypeslib.as_array(llama_cpp.llama_get_logits(handle.context), shape_NV)
        targets_N = ids_BT[:, scored + 1 : end + 1].ravel()
        rows = score_rows(logits_NV, targets_N, handle.pool, handle.plan.threads)
        out.logprob[:, scored - start : end - start] = rows.logprob.reshape(n_rows, -1)
        out.top1[:, scored - start : end - start] = rows.top1.reshape(n_rows, -1)


def _piece_bounds(n_positions: int, plan: Plan) -> list[int]:
    """Where to cut a window so that each piece of every row fits one llama_decode.

    Equal pieces, because a short last one could fall below FLASH_TILE_TOKENS.
    """
    n_pieces = -(-n_positions // (plan.n_batch // plan.batch_windows))
    return [n_positions * i // n_pieces for i in range(n_pieces + 1)]


def _decode_failure(handle: _Handle, status: int) -> ModelError:
    error = _llama.failure(f"llama_decode returned {status}", handle.path, "engine_error")
    return ModelError(error.message, "oom_forward") if error.category == "oom_load" else error
