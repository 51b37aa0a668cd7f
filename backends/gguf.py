"""GGUF models through llama.cpp's C API (llama-cpp-python).

A batch of windows is decoded as parallel sequences in pieces of n_batch tokens that carry the KV cache on,
so the logits buffer is n_batch * V floats whatever the window. Logits are asked for at scored positions
only and read where llama.cpp wrote them. The last token of a window predicts nothing and is not decoded.
Parameters: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

import ctypes
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends import _llama
from evalq.backends._chat_template import render
from evalq.backends._llama_batch import COLUMNS, LlamaBatch, score_rows
from evalq.backends._llama_generate import Generation
from evalq.backends._llama_plan import (
    CACHE_OPTIONS,
    OPTIONS,
    PLAIN_CACHE,
    Plan,
    cache_types,
    context_params,
    generation_params,
    make_plan,
    model_params,
)
from evalq.backends._llama_predict import predict
from evalq.backends._llama_reference import gives_again, hidden_head, pack
from evalq.engine.backend import (
    NO_TEMPLATE,
    Backend,
    Batch,
    Encoded,
    Generated,
    Ids,
    LoadedModel,
    LoadRequest,
    Machine,
    Piece,
    Prediction,
    Scores,
    Tokenizer,
    check_generation,
    reading_ahead,
)
from evalq.engine.columns import REFERENCE, REFERENCE_ROWS
from evalq.engine.kv_cache import KV_CACHE, KvCache, step_bounds
from evalq.engine.reference import NumpyReference, Packed, ReferenceHead
from evalq.errors import ModelError

_NOTABLE_WARNING = r"missing pre-tokenizer|not supported, set to disabled|bad special token"


@dataclass
class _Handle:
    """What load() took: llama_model, llama_context, threads for the log-sum-exp.

    `kept` says how the distributions are kept as a reference, `reference` is what they are compared with,
    `options` are the spec's, `adapter` is a llama_adapter_lora, `generation` a context of its own for
    continuing prompts, made when it is first needed.
    """

    path: Path
    model: Any
    context: Any
    plan: Plan
    batch: LlamaBatch
    pool: ThreadPoolExecutor | None
    kept: ReferenceHead | None = None
    reference: NumpyReference | None = None
    options: dict[str, Any] = field(default_factory=dict)
    adapter: Any = None
    generation: Generation | None = None

    @property
    def shows_hidden(self) -> bool:
        """Whether llama.cpp hands out hidden states; it then works out the logits of every position."""
        return self.kept is not None and self.kept.kind == "hidden"


class GgufBackend(Backend):
    """llama.cpp."""

    distributions = ("llama-cpp-python",)
    install = 'pip install "evalq[gguf]"  # compiles llama.cpp; GPU: CMAKE_ARGS="-DGGML_CUDA=on" first'
    options = OPTIONS
    columns = COLUMNS
    lora_features = frozenset()
    has_tokenizer = True
    generates = True

    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a GGUF file and size a context for the request's windows. Raises ModelError."""
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """Batch by batch; of a batch, at most `batch_windows` windows at a time.

        Raises:
            ModelError: oom_forward, or engine_error in llama.cpp's own words.
        """
        for batch in reading_ahead(batches):
            yield _score(model.handle, batch)

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """All prompts side by side, each a sequence of its own. Raises ModelError."""
        check_generation(prompts, new_tokens, model.max_positions, model.vocab_size)
        room = _generation(model.handle, len(prompts), max(map(len, prompts), default=0) + new_tokens)
        return room.generate(prompts, new_tokens, stop_ids)

    def close(self, model: LoadedModel) -> None:
        """Free the context and the weights; a second call does nothing."""
        handle: _Handle = model.handle
        if handle.context:
            llama_cpp = _llama.engine()
            if handle.pool:
                handle.pool.shutdown()
            if handle.generation is not None:
                handle.generation.close()
            llama_cpp.llama_free(handle.context)
            llama_cpp.llama_model_free(handle.model)
            handle.context = handle.model = None

    def load_tokenizer(self, path: Path, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer of a GGUF file or of a directory that holds one, without its weights."""
        return load_tokenizer(path)

    def kv_cache(self, options: Mapping[str, Any]) -> KvCache | None:
        """By either name; None for llama.cpp's own, f16."""
        found = cache_types(options)
        return None if found == PLAIN_CACHE and KV_CACHE not in options else found

    def predict(self, request: LoadRequest, machine: Machine) -> Prediction | None:
        """Weights and KV cache; it never says that they do not fit, because files are mapped."""
        return predict(request)

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores:
        """With a second context on the same weights, whose cache is f16."""
        handle: _Handle = model.handle
        options = {name: value for name, value in handle.options.items() if name not in CACHE_OPTIONS}
        plain = replace(handle, options=options, kept=None, reference=None, generation=None)
        plain.context = _context(plain)
        try:
            return _score(plain, batch)
        finally:
            _llama.engine().llama_free(plain.context)


def _load(request: LoadRequest) -> LoadedModel:
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
        handle = _Handle(path, model, None, plan, LlamaBatch(plan.n_batch), None)
        handle.options, handle.adapter = request.options, adapter
        handle.context = _context(handle)
    except ModelError:
        llama_cpp.llama_model_free(model)  # and with it the adapter
        raise
    handle.pool = ThreadPoolExecutor(plan.threads) if plan.threads > 1 else None
    if REFERENCE_ROWS in request.columns:
        handle.kept = _kept(handle)
    if request.reference is not None:
        handle.reference = NumpyReference(request.reference)
    return _describe(handle)


def _context(handle: _Handle) -> Any:
    """A llama_context for the windows of its plan. Raises ModelError."""
    context = _llama.engine().llama_init_from_model(handle.model, context_params(handle.plan, handle.options))
    if not context:
        raise _llama.failure("no context could be made", handle.path, "engine_error")
    if handle.adapter is not None:
        _llama.apply_adapter(context, handle.adapter, handle.path)
    return context


def _generation(handle: _Handle, n_prompts: int, n_tokens: int) -> Generation:
    """A context with room for that many prompts of that many tokens each, new ones included.

    Scoring keeps its own, so that its numbers do not depend on what else a model is asked to do.
    """
    if handle.generation is None or not handle.generation.holds(n_prompts, n_tokens):
        if handle.generation is not None:
            handle.generation.close()
            handle.generation = None
        params = generation_params(handle.plan, handle.options, n_prompts, n_tokens)
        made = Generation(handle.path, handle.model, params, _vocab_size(handle))
        if handle.adapter is not None:
            _llama.apply_adapter(made.context, handle.adapter, handle.path)
        handle.generation = made
    return handle.generation


def _kept(handle: _Handle) -> ReferenceHead:
    """How the distributions are kept, found out on a few tokens."""
    llama_cpp = _llama.engine()
    vocab_size = _vocab_size(handle)
    head = hidden_head(handle.path, vocab_size)
    if head is not None:
        handle.kept = head
        llama_cpp.llama_set_embeddings(handle.context, True)
        ids_1T = (np.arange(8) % vocab_size)[None]
        hidden_Nd, logits_NV = _decoded(handle, ids_1T, 0, 0)
        if hidden_Nd is not None and gives_again(head, hidden_Nd, logits_NV):
            return head
        llama_cpp.llama_set_embeddings(handle.context, False)
    return ReferenceHead.of_logits(vocab_size)


def _score(handle: _Handle, batch: Batch) -> Scores:
    columns = {column.name: column.dtype for column in COLUMNS}
    scores: Scores = {name: np.empty(batch.shape, columns[name]) for name in batch.columns if name in columns}
    if REFERENCE_ROWS in batch.columns and handle.kept is not None:
        width, dtype = handle.kept.row_shape
        scores[REFERENCE_ROWS] = np.empty((*batch.shape, width), dtype)
    beside = None if handle.reference is None else batch.inputs.get(REFERENCE)
    n_windows, n_targets = batch.shape
    if n_targets:
        for row in range(0, n_windows, handle.plan.batch_windows):
            rows = slice(row, row + handle.plan.batch_windows)
            out = {name: column[rows] for name, column in scores.items()}
            kept = None if beside is None else beside[rows]
            _score_windows(handle, batch.ids_BT[rows], batch.first_target - 1, out, kept)
    return scores


class GgufTokenizer(Tokenizer):
    """The tokenizer inside a GGUF file: a llama_model without weights, freed when nothing refers to it."""

    def __init__(self, model: Any) -> None:
        """Take over a model that was opened for its vocabulary only."""
        llama_cpp = _llama.engine()
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        template = llama_cpp.llama_model_chat_template(model, None)
        self._template = template.decode(errors="replace") if template else None
        weakref.finalize(self, llama_cpp.llama_model_free, model)
        bos, eos = llama_cpp.llama_vocab_bos(self._vocab), llama_cpp.llama_vocab_eos(self._vocab)
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.stop_ids = frozenset(
            token for token in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self._vocab, token)
        )

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text; add_special puts BOS and EOS as the vocabulary asks for."""
        ids: list[int] = _llama.tokenize(self._vocab, text, add_special)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return _llama.detokenize(self._vocab, ids)

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """From the vocabulary."""
        llama_cpp, unique = _llama.engine(), sorted(set(ids))
        texts = _llama.pieces(self._vocab, unique)
        known = {
            token: Piece(text, bool(llama_cpp.llama_vocab_is_control(self._vocab, token)))
            for token, text in zip(unique, texts, strict=True)
        }
        return [known[token] for token in ids]

    def chat_text(self, messages: Sequence[Mapping[str, str]], opening: bool = False) -> str:
        """By the file's tokenizer.chat_template, in a sandbox."""
        if not self._template:
            raise ModelError("there is no chat template", "tokenizer_mismatch", NO_TEMPLATE)
        special = {
            name: "" if token is None else self.decode([token])
            for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
        }
        return render(self._template, messages, opening, special)

    def encode_chat(self, text: str) -> Encoded:
        """What is written as a special token is one, as llama.cpp reads chats. Raises ModelError."""
        llama_cpp = _llama.engine()
        ids = _llama.tokenize(self._vocab, text, parse_special=True)
        spans = places(text, _llama.pieces(self._vocab, ids))
        if spans is None:
            return super().encode_chat(text)
        return Encoded(ids, spans, [bool(llama_cpp.llama_vocab_is_control(self._vocab, i)) for i in ids])


def places(text: str, pieces: Sequence[bytes]) -> list[tuple[int, int]] | None:
    """Where tokens stand in a text, start and end in characters, by what each stands for.

    A vocabulary may put a space before a word that the text does not have. Bytes of one character stand
    where the character does.

    Returns:
        None where the pieces are not those of the text.
    """
    raw = text.encode()
    # Of each byte the character that it belongs to, and one past the last.
    of_byte = np.cumsum([int(byte & 0xC0 != 0x80) for byte in raw]) - 1
    at, found = 0, []
    for piece in pieces:
        if not raw.startswith(piece, at):
            piece = piece.removeprefix(b" ")
            if not raw.startswith(piece, at):
                return None
        end = at + len(piece)
        start = int(of_byte[at]) if at < len(raw) else len(text)
        found.append((start, int(of_byte[end - 1]) + 1 if piece else start))
        at = end
    return found if at == len(raw) else None


def load_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer of a GGUF file or of a directory that holds one, without its weights.

    Raises:
        ModelError: as loading; unsupported_format when the file holds no tokenizer.
    """
    llama_cpp = _llama.engine()
    file = _llama.first_part(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = _llama.open_model(file, params)
    if not _llama.has_vocabulary(llama_cpp.llama_model_get_vocab(model)):
        llama_cpp.llama_model_free(model)
        raise ModelError(f"{file.name} holds no tokenizer", "unsupported_format", "set tokenizer_dir")
    return GgufTokenizer(model)


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
    rotated = {m[1].upper() for m in _llama.LOG.matches(r"attn_rot_([kv]) = 1")}
    if rotated:
        notes.append(f"llama.cpp rotates {' and '.join(sorted(rotated))} before it quantizes them (Hadamard)")
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
        reference_head=handle.kept,
    )


def _device(plan: Plan) -> str:
    """What llama.cpp says it uses, "cuda:0 NVIDIA H200", else "cpu"."""
    used = _llama.LOG.matches(r"using device (\S+?)(\d*) \((.+?)\)") if plan.n_gpu_layers else []
    names = [f"{m[1].lower()}{':' + m[2] if m[2] else ''} {m[3]}" for m in used]
    return ", ".join(names) or "cpu"


def _score_windows(
    handle: _Handle, ids_BT: Ids, start: int, out: Scores, beside_BRw: Packed | None = None
) -> None:
    """Score up to batch_windows rows into `out`, [B, R]; `start` is the first position with logits."""
    llama_cpp = _llama.engine()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle.context), True)
    n_rows, n_tokens = ids_BT.shape
    # What fits one llama_decode; equal pieces, so that none falls below FLASH_TILE_TOKENS.
    at_once = handle.plan.n_batch // handle.plan.batch_windows
    for first, end in pairwise(step_bounds(n_tokens - 1, at_once)):
        hidden_Nd, logits_NV = _decoded(handle, ids_BT[:, first:end], first, start)
        scored = max(first, start)
        if scored >= end:
            continue
        targets = slice(scored - start, end - start)
        targets_N = ids_BT[:, scored + 1 : end + 1].ravel()
        reference_NV = None
        if beside_BRw is not None and handle.reference is not None:
            kept = beside_BRw[:, targets]
            reference_NV = handle.reference.logits(kept.reshape(-1, kept.shape[-1]))
        columns = [name for name in out if name != REFERENCE_ROWS]
        found = score_rows(logits_NV, targets_N, columns, handle.pool, handle.plan.threads, reference_NV)
        for name, column in found.items():
            out[name][:, targets] = column.reshape(n_rows, -1)
        if REFERENCE_ROWS in out and handle.kept is not None:
            rows = pack(handle.kept, logits_NV if hidden_Nd is None else hidden_Nd)
            out[REFERENCE_ROWS][:, targets] = rows.reshape(n_rows, -1, rows.shape[-1])


def _decoded(
    handle: _Handle, ids_BP: Ids, first: int, start: int
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
    """Run positions first.. of each row.

    Returns:
        Hidden states [N, d], where they are shown, and logits [N, V] of the positions from `start` on, row
        after row; both as llama.cpp wrote them, until its next call.
    """
    llama_cpp = _llama.engine()
    n_rows, n_positions = ids_BP.shape
    _llama.LOG.clear()
    wanted_from = 0 if handle.shows_hidden else start
    status = llama_cpp.llama_decode(handle.context, handle.batch.fill(ids_BP, first, wanted_from))
    if status != 0:
        raise _decode_failure(handle, status)
    n_out = first + n_positions - max(first, wanted_from)
    if n_out <= 0:
        return None, np.empty((0, 0), np.float32)
    scored = slice(max(0, start - max(first, wanted_from)), None)

    def seen(pointer: Any, width: int) -> NDArray[np.float32]:
        every = np.ctypeslib.as_array(pointer, (n_rows, n_out, width))[:, scored]
        rows: NDArray[np.float32] = every.reshape(-1, width)
        return rows

    logits_NV = seen(llama_cpp.llama_get_logits(handle.context), _vocab_size(handle))
    if not handle.shows_hidden:
        return None, logits_NV
    width = llama_cpp.llama_model_n_embd(handle.model)
    return seen(llama_cpp.llama_get_embeddings(handle.context), width), logits_NV


def _vocab_size(handle: _Handle) -> int:
    llama_cpp = _llama.engine()
    return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle.model)))


def _decode_failure(handle: _Handle, status: int) -> ModelError:
    error = _llama.failure(f"llama_decode returned {status}", handle.path, "engine_error")
    return ModelError(error.message, "oom_forward") if error.category == "oom_load" else error
