"""ExLlamaV3: EXL3 checkpoints (and unquantized ones, in float16) on CUDA GPUs.

The body runs on a batch of windows, the head only on scored rows, in chunks that bound memory, and columns
that pad the vocabulary to a multiple of 128 are cropped before the softmax, which is float32 from float32
logits. `streaming` keeps one module of the model on the GPU at a time and runs every window through it.

Importing exllamav3 compiles its extension where no compiled one is installed, changes the CUDA allocator and
sets environment variables; that happens in the worker only.

Source: https://github.com/turboderp-org/exllamav3
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evalq.backends._exl3_cache import CACHES, steps_of, types_of
from evalq.backends._exl3_generate import generate, room_for
from evalq.backends._exl3_predict import predict
from evalq.backends._exl3_run import (
    CHUNK_ROWS_MIN,
    INPUT_TOKENS_MIN,
    MIB,
    Handle,
    head_logits,
    resident,
    stepped,
    streamed,
)
from evalq.backends._exl3_tokenizer import TOKENIZER_FILE, load_tokenizer
from evalq.backends._tokenize import tokenize_fn
from evalq.backends._torch_reference import TorchReference, find_weight, makes_again, reference_notes
from evalq.backends._torch_scores import COLUMNS, peak_memory_fn, reset_peak_memory, to_arrays
from evalq.checkpoint.adapter import Adapter
from evalq.engine.backend import (
    Backend,
    Batch,
    Generated,
    Ids,
    LoadedModel,
    LoadRequest,
    Machine,
    Option,
    Prediction,
    Scores,
    Tokenizer,
    check_generation,
    kv_cache_option,
)
from evalq.engine.columns import REFERENCE_ROWS
from evalq.engine.kv_cache import KV_CACHE, KvCache
from evalq.engine.reference import ReferenceHead
from evalq.errors import ModelError

OPTIONS = {
    "device": Option((str,), "cuda:N (default cuda:0); not together with gpu_split"),
    "gpu_split": Option((list,), "GiB to use of each GPU, [20, 24]: layers are spread over them in order"),
    "streaming": Option(
        (bool,), "one module on the GPU at a time, for models larger than its memory (default false)"
    ),
    KV_CACHE: kv_cache_option(CACHES),
    "cuda_graph": Option(
        (bool,), "replay windows of one shape as one CUDA graph where the model allows (default true)"
    ),
    "batch_windows": Option(
        (int,), "windows per batch (default: as many as fit in 2048 tokens, at least 1)", minimum=1
    ),
    "head_chunk_mib": Option(
        (int,), "most MiB of logits at once (default 32; 192 rows with --kld)", minimum=1
    ),
}
_INSTALL = "pip install exllamav3"
BATCH_TOKENS = 2048
HEAD_CHUNK_MIB = 32
# Beside a reference two heads are read for every chunk, which pays from so many rows on.
BESIDE_CHUNK_ROWS = 192


class Exl3Backend(Backend):
    """ExLlamaV3."""

    distributions = ("exllamav3", "torch")
    install = _INSTALL
    options = OPTIONS
    columns = COLUMNS
    # It skips tensors that it does not know, and scales every module by the adapter's default rank and alpha.
    lora_features = frozenset({"rslora"})
    has_tokenizer = True
    generates = True

    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a checkpoint directory.

        Raises:
            ModelError: engine_missing, no_gpu, bad_option, unsupported_format; the engine's own errors are
                sorted by the caller.
        """
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """In order; with `streaming` every module is loaded once for all batches."""
        handle: Handle = model.handle
        everything = list(batches)
        run = resident if handle.streaming_device is None else streamed
        if handle.steps is not None:
            run = stepped
        if not everything:
            return
        for batch, found in zip(everything, run(handle, everything), strict=True):
            model.setup_seconds = handle.setup_seconds
            yield to_arrays(found, batch.shape)

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """By exllamav3's dynamic generator, a job for each prompt. Raises ModelError."""
        handle: Handle = model.handle
        check_generation(prompts, new_tokens, model.max_positions, model.vocab_size)
        if handle.generation is None:
            raise ModelError("the model was loaded without room to generate", "bad_option")
        return generate(handle.model, handle.generation, prompts, new_tokens, stop_ids)

    def close(self, model: LoadedModel) -> None:
        """Free the model and torch's cache."""
        import torch

        model.handle.model.unload()
        model.handle = None
        torch.cuda.empty_cache()

    def kv_cache(self, options: Mapping[str, Any]) -> KvCache | None:
        """Types of the cache that the options name. Raises ModelError (bad_option)."""
        return types_of(options)

    def predict(self, request: LoadRequest, machine: Machine) -> Prediction | None:
        """Weights and KV cache against the GPU. Raises SpecError for what has no planner."""
        return predict(request, machine)

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores:
        """Through a float16 cache beside the quantized one."""
        (found,) = stepped(model.handle, [batch], plain=True)
        return to_arrays(found, batch.shape)

    def load_tokenizer(self, path: Path, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer of a checkpoint directory. Raises ModelError when there is none."""
        return load_tokenizer(path, trust_remote_code)


def _load(request: LoadRequest) -> LoadedModel:
    _check(request)
    import torch

    options = request.options
    device = torch.device(options.get("device", "cuda:0"))
    torch.cuda.init()  # exllamav3's loader needs the context before its first allocation
    model = _model(request)
    streaming, use_graph = bool(options.get("streaming")), bool(options.get("cuda_graph", True))
    if streaming or use_graph:
        _small_workspace(model)
    inputs = max(INPUT_TOKENS_MIN, request.window_tokens - 1)
    batch_windows = options.get("batch_windows", max(1, BATCH_TOKENS // inputs))
    vocab_size = int(model.config.vocab_size)
    chunk_bytes = options.get("head_chunk_mib", HEAD_CHUNK_MIB) * MIB // request.divide_work
    chunk_rows = max(CHUNK_ROWS_MIN, chunk_bytes // (4 * vocab_size))
    if request.reference is not None and "head_chunk_mib" not in options:
        chunk_rows = max(chunk_rows, BESIDE_CHUNK_ROWS // request.divide_work)
    steps = steps_of(model, request, batch_windows, INPUT_TOKENS_MIN)
    generation = room_for(model, request)
    if not streaming:
        split = options.get("gpu_split")
        if split is None:
            model.load(device=device)
        else:
            # The loader runs each module once on this many tokens to see what fits where.
            at_once = inputs if steps is None else steps.pages_of_a_step
            model.load(
                use_per_device=split, max_chunk_size=batch_windows * at_once, max_output_size=chunk_rows
            )
    if request.adapter is not None:
        _apply_adapter(model, request.adapter)
    head = model.modules[-1]
    model.fwd_modules = [entry for entry in model.fwd_modules if entry[0] is not head]
    notes = ["streamed: one module on the GPU at a time"] if streaming else []
    notes += [] if steps is None else steps.notes
    handle = Handle(
        model,
        model.modules[:-1],
        head,
        vocab_size,
        chunk_rows,
        streaming_device=device if streaming else None,
        use_graph=use_graph,
        notes=notes,
        steps=steps,
        generation=generation,
    )
    if REFERENCE_ROWS in request.columns:
        handle.kept = _kept(handle, request)
    if request.reference is not None:
        handle.reference = TorchReference(request.reference, device)
        notes += reference_notes(handle.reference)
    return LoadedModel(
        handle=handle,
        reference_head=handle.kept,
        vocab_size=vocab_size,
        max_positions=None,  # evalq reads config.json itself; the engine invents 8192 where it says nothing
        device=_devices(model, device),
        dtype="float16",
        batch_windows=batch_windows,
        tokenize=tokenize_fn(request, load_tokenizer, (TOKENIZER_FILE,)),
        peak_memory_bytes=peak_memory_fn(device),
        reset_peak_memory=reset_peak_memory,
        versions={"cuda": str(torch.version.cuda)},
        notes=notes,
        warm_up=not streaming,
    )


def _kept(handle: Handle, request: LoadRequest) -> ReferenceHead:
    """How the distributions are kept: by what goes into an unquantized head, else by the logits."""
    import torch

    size, head = handle.vocab_size, handle.head
    by_logits = ReferenceHead.of_logits(size)
    inner: Any = getattr(head, "inner", None)
    if inner is None or inner.quant_type != "fp16" or inner.bias is not None or request.adapter is not None:
        return by_logits
    weight_Vd = inner.weight.T[:size, : head.in_features_unpadded]
    weight = find_weight(request.path, weight_Vd)
    if weight is None:
        return by_logits
    kept = ReferenceHead(
        kind="hidden",
        dtype="float16",
        width=weight.columns,
        vocab_size=size,
        weight=weight,
        multiplier=head.post_scale,
        soft_cap=head.softcap or None,
    )
    rows_RH = torch.randn(8, weight.columns, dtype=torch.float16, device=inner.weight.device)
    with torch.inference_mode():
        again = makes_again(kept, rows_RH, head_logits(handle, rows_RH))
    return kept if again else by_logits


def _check(request: LoadRequest) -> None:
    """Everything that can be known without importing the engine, which may take minutes to compile."""
    request.require_directory(takes_overlay=True)
    for package in ("exllamav3", "torch"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"{package} is not installed", "engine_missing", f"{_INSTALL} (needs a CUDA build of torch)"
            )
    import torch

    if not torch.cuda.is_available():
        raise ModelError(
            "exllamav3 needs a CUDA GPU and torch sees none",
            "no_gpu",
            f'use a machine with an NVIDIA GPU and a CUDA build of torch; there: "{_INSTALL}"',
        )
    _check_options(request.options)
    if request.adapter is not None and request.options.get("streaming"):
        raise ModelError("streaming drops adapters with their modules", "bad_adapter", "remove streaming")


def _check_options(options: dict[str, Any]) -> None:
    """Raises ModelError bad_option for values that no type check can refuse."""
    split = options.get("gpu_split")
    numbers = split is None or (
        len(split) > 0 and all(isinstance(g, int | float) and not isinstance(g, bool) for g in split)
    )
    if not numbers or (split is not None and (min(split) < 0 or max(split) <= 0)):
        raise ModelError(f"gpu_split is {split}, not a list of GiB for each GPU", "bad_option")
    if split is not None and ("device" in options or options.get("streaming")):
        raise ModelError("gpu_split excludes device and streaming", "bad_option", "remove one of them")
    device = options.get("device", "cuda:0")
    if device != "cuda" and not (device.startswith("cuda:") and device[5:].isdecimal()):
        raise ModelError(f'device is "{device}", exllamav3 runs on cuda:0, cuda:1, ...', "bad_option")


def _model(request: LoadRequest) -> Any:
    """The model without its weights. The engine refuses architectures by assertions."""
    from exllamav3 import Config, Model

    try:
        config = Config.from_directory(str(request.path))
        if request.overlay is not None:
            config.stc.add_tensor_files(str(request.overlay))
        # Models with two sets of rotary factors choose by the length that will be used.
        config.override_dynamic_seq_len(request.longest_tokens)
        model = Model.from_config(config)
    except AssertionError as error:
        raise ModelError(f"exllamav3: {error}", "unsupported_format") from None
    if config.vocab_size is None or not model.modules[-1].caps.get("logits_output"):
        raise ModelError(
            f"exllamav3 builds {config.architecture} without a head at its end", "unsupported_format"
        )
    return model


def _apply_adapter(model: Any, adapter: Adapter) -> None:
    """Put an adapter on a loaded model. Raises ModelError unless every module of it found its place."""
    from exllamav3.model.lora import LoRA

    lora = LoRA.from_directory(model, str(adapter.path))
    placed = [
        m for m in lora.target_modules.values() if lora in m.lora_a_tensors and lora in m.lora_b_tensors
    ]
    if len(placed) != len(adapter.shapes):
        raise ModelError(
            f"exllamav3 places {len(placed)} of the {len(adapter.shapes)} modules of adapter {adapter.name}",
            "bad_adapter",
            'merge it into the base before the conversion ("evalq merge-lora")',
        )


def _small_workspace(model: Any) -> None:
    """Keep torch from reserving 32 MiB (on Hopper) for cuBLAS, which exllamav3 gives a workspace of its own.

    Reading the variable costs torch some microseconds at every product, so it is set only where few products
    are launched one by one; without quantized weights torch's own products need the workspace.
    """
    from evalq.backends._exl3_graph import dense

    if "quantization_config" in model.config.config_dict and dense(model.modules):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")


def _devices(model: Any, device: Any) -> str:
    """Every GPU that holds a part of the model, with its name."""
    import torch

    used = {m.device for m in model.modules if m.device is not None}
    found = sorted({str(torch.device(d)) for d in used if torch.device(d).type == "cuda"} or {str(device)})
    return ", ".join(f"{name} {torch.cuda.get_device_name(name)}" for name in found)
