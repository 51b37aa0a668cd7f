"""transformers: any causal language model directory, on a GPU or a CPU.

The body runs once per batch and the head only on scored rows, in chunks that bound memory, so a window costs
its hidden states and one chunk of logits instead of [T, V] twice. Log-probabilities are computed in float32
from logits in the model's dtype, with the model's own scaling and soft cap.

compressed-tensors checkpoints are decompressed at loading and run with plain kernels. Their weights are
exactly the format's; where it quantizes activations too, compressed-tensors simulates that in PyTorch.

Source: https://huggingface.co/docs/transformers
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from evalq.backends._hf_cache import CACHES, cache_bits, new_cache
from evalq.backends._hf_experts import ExpertCounter
from evalq.backends._hf_generate import generate
from evalq.backends._hf_noise import LayerNoise
from evalq.backends._hf_predict import GPU_BATCH_TOKENS, HEAD_CHUNK_MIB, predict
from evalq.backends._token_pieces import pieces_of
from evalq.backends._tokenize import tokenize_fn
from evalq.backends._torch_reference import (
    RowKeeper,
    TorchReference,
    dtype_name,
    find_weight,
    logits_of,
    reference_notes,
    rows_of,
)
from evalq.backends._torch_scores import COLUMNS, peak_memory_fn, reset_peak_memory, score_rows, to_arrays
from evalq.checkpoint.adapter import FEATURES, Adapter
from evalq.engine.backend import (
    LAYER_NOISE,
    NO_TEMPLATE,
    Backend,
    Batch,
    Encoded,
    Generated,
    Ids,
    LoadedModel,
    LoadRequest,
    Machine,
    Option,
    Piece,
    Prediction,
    Scores,
    Tokenizer,
    check_generation,
    kv_cache_option,
    reading_ahead,
)
from evalq.engine.columns import REFERENCE_ROWS
from evalq.engine.kv_cache import KV_CACHE, step_bounds
from evalq.engine.reference import ReferenceHead
from evalq.errors import ModelError
from evalq.files import read_json

OPTIONS = {
    "dtype": Option(
        (str,),
        "of weights and arithmetic (default auto: the checkpoint's)",
        ("auto", "float32", "bfloat16", "float16"),
        numeric=True,
    ),
    "device": Option((str,), "auto (CUDA, then MPS, then CPU), cpu, cuda:N, mps, or balanced over all GPUs"),
    KV_CACHE: kv_cache_option(CACHES),
    "attention": Option(
        (str,),
        "sdpa (default), eager or flash_attention_2",
        ("sdpa", "eager", "flash_attention_2"),
        numeric=True,
    ),
    "quantize_activations": Option(
        (bool,), "where the format asks for it (default true); false runs its weights alone", numeric=True
    ),
    LAYER_NOISE: Option(
        (int, float),
        "multiply every layer's output by 1 + this * normal, one window at a time (default 0: as it is)",
        numeric=True,
        minimum=0,
    ),
    "batch_windows": Option(
        (int,), "windows per forward (default: 1 on a CPU, up to 8192 tokens on a GPU)", minimum=1
    ),
    "head_chunk_mib": Option((int,), "most MiB of logits at once (default 96)", minimum=1),
    "threads": Option((int,), "CPU threads (default: torch's, one per core)", minimum=1),
}
MIB = 2**20
# Libraries that transformers imports for the formats they brought.
_QUANTIZERS = ("bitsandbytes", "gptqmodel", "optimum")


@dataclass
class _Handle:
    """A loaded model, taken apart.

    Args:
        model: the whole.
        body: ids -> hidden states; None where head and body cannot be told apart.
        head: the output projection.
        chunk_rows: rows of logits to make at once.
        kept: how this model's distributions are kept as a reference; None where they are not asked for.
        reference: distributions that this model is compared with, or None.
        step_tokens: tokens of a window in one forward pass at most, None for all of them.
        cache_bits: of HQQ's cache between them; None for an unquantized one.
    """

    model: Any
    body: Any
    head: Any
    chunk_rows: int
    kept: ReferenceHead | None = None
    reference: TorchReference | None = None
    step_tokens: int | None = None
    cache_bits: int | None = None


class HfBackend(Backend):
    """transformers."""

    distributions = ("transformers", "torch", "compressed-tensors")
    install = 'pip install "evalq[hf]"'
    options = OPTIONS
    columns = COLUMNS
    # PEFT applies what it trained. aLoRA and routed variants depend on the prompt, which a window is not.
    lora_features = frozenset(FEATURES) - {"alora", "variant"}
    has_tokenizer = True
    generates = True

    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a checkpoint directory. Raises ModelError; the caller sorts transformers' own errors."""
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """Batch by batch."""
        for batch in reading_ahead(batches):
            yield _score(model.handle, batch)

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """All prompts as one batch, as transformers generates. Raises ModelError."""
        check_generation(prompts, new_tokens, model.max_positions, model.vocab_size)
        if model.handle.cache_bits is not None:
            message = "hf scores with a quantized KV cache, and generates with an unquantized one only"
            raise ModelError(message, "bad_option", f"remove {KV_CACHE}")
        return generate(model.handle.model, prompts, new_tokens, stop_ids)

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores:
        """Through an unquantized cache."""
        return _score(replace(model.handle, cache_bits=None), batch)

    def close(self, model: LoadedModel) -> None:
        """Free the model and, on a GPU, torch's cache."""
        import torch

        model.handle = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load_tokenizer(self, path: Path, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer of a checkpoint directory. Raises ModelError when there is none."""
        return load_tokenizer(path, trust_remote_code)

    def predict(self, request: LoadRequest, machine: Machine) -> Prediction | None:
        """Weights, hidden states and logits, against what is free."""
        return predict(request, machine)


def _load(request: LoadRequest) -> LoadedModel:
    request.require_directory()
    # compressed-tensors compiles helpers at import; a compiler run costs more than it saves for one model.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch

    options = request.options
    if "threads" in options:
        torch.set_num_threads(options["threads"])
    device = _device(options.get("device", "auto"))
    model = _from_pretrained(request, device)
    if request.adapter is not None:
        model = _with_adapter(model, request.adapter)
    model.eval()
    notes = _activation_notes(model, options.get("quantize_activations", True))
    first = next(model.parameters()).device
    on_cpu = first.type == "cpu"
    inputs = max(1, request.window_tokens - 1)
    head = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0]) if hasattr(head, "weight") else int(_text_config(model).vocab_size)
    chunk_bytes = options.get("head_chunk_mib", HEAD_CHUNK_MIB) * MIB // request.divide_work
    handle = _Handle(model, _body_of(model), head, max(1, chunk_bytes // (4 * vocab_size)))
    handle.step_tokens = request.step_tokens
    handle.cache_bits = cache_bits(request.options, str(model.dtype))
    noise = options.get(LAYER_NOISE, 0)
    if noise:
        LayerNoise(handle.body or model, int(_text_config(model).num_hidden_layers), noise)
        notes.append(f"every layer's output is multiplied by 1 + {noise:g} * normal")
    if REFERENCE_ROWS in request.columns:
        handle.kept = _kept(handle, request.path, vocab_size)
    if request.reference is not None:
        handle.reference = TorchReference(request.reference, first)
        notes += reference_notes(handle.reference)
    at_once = 1 if on_cpu or noise else max(1, GPU_BATCH_TOKENS // inputs)
    return LoadedModel(
        handle=handle,
        vocab_size=vocab_size,
        max_positions=getattr(_text_config(model), "max_position_embeddings", None),
        device=str(first) if on_cpu else f"{first} {_gpu_name(first)}",
        dtype=str(model.dtype).removeprefix("torch."),
        batch_windows=options.get("batch_windows", at_once),
        tokenize=tokenize_fn(request, load_tokenizer),
        peak_memory_bytes=peak_memory_fn(first),
        reset_peak_memory=reset_peak_memory,
        versions=_versions(on_cpu),
        notes=notes,
        warm_up=not on_cpu,
        reference_head=handle.kept,
        expert_tokens=ExpertCounter(model).take,
    )


def _score(handle: "_Handle", batch: Batch) -> Scores:
    """Score a batch. The last token of a window predicts nothing that is asked for, so it is not run."""
    import torch

    first = batch.first_target - 1
    with torch.inference_mode():
        inputs = torch.from_numpy(np.ascontiguousarray(batch.ids_BT[:, :-1])).to(handle.model.device)
        targets = torch.from_numpy(np.ascontiguousarray(batch.targets_BR)).flatten()
        rows = _rows(handle, inputs, first)
        rows_RH = rows.flatten(0, 1)
        keeper = RowKeeper(handle.kept) if REFERENCE_ROWS in batch.columns else None
        found = score_rows(
            lambda part: _logits(handle, rows_RH[part]),
            targets.to(rows.device),
            handle.chunk_rows,
            batch.columns,
            reference_of=logits_of(handle.reference, rows_of(handle.reference, batch)),
            keep=None if keeper is None else keeper.keep_logits,
        )
        scores = to_arrays(found, batch.shape)
        if keeper is not None:
            scores[REFERENCE_ROWS] = keeper.rows(rows_RH, batch.shape)
        return scores


def _rows(handle: "_Handle", inputs_BT: Any, first: int) -> Any:
    """What goes into the head at positions from `first` on, [B, R, H]; the logits where body is None."""
    n_inputs = inputs_BT.shape[1]
    if handle.step_tokens is None or n_inputs <= handle.step_tokens:
        return _forward(handle, inputs_BT, n_inputs - first, {"use_cache": False})
    import torch

    through = {"use_cache": True, "past_key_values": new_cache(handle.model, handle.cache_bits)}
    found = []
    for start, end in pairwise(step_bounds(n_inputs, handle.step_tokens)):
        step_BT = inputs_BT[:, start:end]
        found.append(_forward(handle, step_BT, max(0, end - max(start, first)), through))
    return torch.cat(found, dim=1)


def _forward(handle: "_Handle", inputs_BT: Any, kept: int, cache: dict[str, Any]) -> Any:
    """One forward pass: of its last `kept` positions, as _rows() returns them."""
    n_inputs = inputs_BT.shape[1]
    if handle.body is None:
        rows = handle.model(inputs_BT, logits_to_keep=max(1, kept), **cache).logits
    else:
        rows = handle.body(inputs_BT, **cache).last_hidden_state
    return rows[:, rows.shape[1] - kept :] if kept < n_inputs else rows


def _logits(handle: "_Handle", rows_RH: Any) -> Any:
    """Logits of hidden states, or the rows themselves where they are logits already, [R, V].

    They may be overwritten: nobody reads a model's logits after they were scored.
    """
    return rows_RH if handle.body is None else _finish(handle.model, handle.head(rows_RH))


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return _Tokenizer(found, _stop_ids(path))
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "set tokenizer_dir in the data spec to a directory with a tokenizer"
        raise ModelError(
            f"{path} has no usable tokenizer: {first[0]}", "tokenizer_mismatch", remedy
        ) from None


class _Tokenizer(Tokenizer):
    """A transformers tokenizer as the framework sees it."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int] = frozenset()) -> None:
        """`stop_ids` are those of the checkpoint's generation_config.json."""
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.stop_ids = stop_ids | (frozenset() if self.eos_id is None else {self.eos_id})
        self.vocab_size = len(tokenizer)
        with_special = self.encode("a", True)
        self.adds_bos = self.bos_id is not None and with_special[:1] == [self.bos_id]

    def encode(self, text: str, add_special: bool) -> list[int]:
        # verbose=False: that a text is longer than the model's positions is what windows are for.
        return list(self._tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Nothing tidied up: every space is the text's own."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """From the vocabulary; of tokenizers without a tokenizer.json nothing is known."""
        tokenizer = getattr(self._tokenizer, "backend_tokenizer", None)
        return super().pieces(ids) if tokenizer is None else pieces_of(tokenizer, ids)

    def chat_prefix(self) -> list[int]:
        """The opening of a chat, as exllamav3's compare_q puts it before every window."""
        user = {"role": "user", "content": "Say something."}
        for messages in ([{"role": "system", "content": ""}, user], [user]):
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # a template is a program of the checkpoint: it may raise anything
                problem = str(error)
                continue
            return self.encode(text, False)
        raise ModelError(f"the chat template cannot be rendered: {problem}", "tokenizer_mismatch")

    def chat_text(self, messages: Sequence[Mapping[str, str]], opening: bool = False) -> str:
        """By transformers' apply_chat_template, in its sandbox."""
        self._require_template()
        given = [dict(message) for message in messages]
        return str(self._tokenizer.apply_chat_template(given, add_generation_prompt=opening, tokenize=False))

    def chat_answers(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int]] | None:
        """Where {% generation %} in the template says; as return_assistant_tokens_mask, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        self._require_template()
        template = self._tokenizer.get_chat_template()
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        found = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(int(start), int(end)) for start, end in found[1][0]]

    def encode_chat(self, text: str) -> Encoded:
        """A fast tokenizer's offsets."""
        if not self._tokenizer.is_fast:
            return super().encode_chat(text)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(found["input_ids"])
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return Encoded(ids, [tuple(span) for span in found["offset_mapping"]], [i in special for i in ids])

    def _require_template(self) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ModelError("there is no chat template", "tokenizer_mismatch", NO_TEMPLATE)


def _stop_ids(path: Path) -> frozenset[int]:
    """Tokens that end an answer, as the checkpoint's generation_config.json says."""
    found = read_json(path / "generation_config.json") if path.is_dir() else None
    ids = found.get("eos_token_id") if isinstance(found, dict) else None
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in listed if isinstance(i, int) and not isinstance(i, bool))


def _device(name: str) -> Any:
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _from_pretrained(request: LoadRequest, device: str) -> Any:
    """The model on its device, every floating-point parameter in the dtype asked for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    trust = {"trust_remote_code": request.trust_remote_code}
    config = AutoConfig.from_pretrained(request.path, **trust)
    dtype = request.options.get("dtype", "auto")
    arguments: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "device_map": "auto" if device == "balanced" else device,
        "attn_implementation": request.options.get("attention", "sdpa"),
        "use_safetensors": True,
        **trust,
    }
    quantization = _quantization_of(config)
    if quantization.get("quant_method") == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    causal = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = kind.from_pretrained(request.path, **arguments)
    if dtype != "auto":
        # Decompressed layers keep the dtype of their scales. Buffers (rotary frequencies) stay as they are.
        for parameter in model.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(arguments["dtype"])
    return model


def _with_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with a PEFT adapter in its layers. Raises ModelError: no PEFT, or it does not go on."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"adapters need PEFT: {error}", "engine_missing", 'pip install "evalq[lora]"'
        ) from None
    return PeftModel.from_pretrained(model, adapter.path).get_base_model()


def _quantization_of(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, dict) else dict(found.to_dict())


def _activation_notes(model: Any, quantize: bool) -> list[str]:
    """Switch simulated activation quantization off if asked to, and say which way it was."""
    asked = [
        module
        for module in model.modules()
        if getattr(getattr(module, "quantization_scheme", None), "input_activations", None) is not None
    ]
    if not asked:
        return []
    if not quantize:
        for module in asked:
            module.quantization_enabled = False
        return ["the format quantizes activations, this run does not (quantize_activations: false)"]
    return ["activations are quantized as the format asks, simulated by compressed-tensors"]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _body_of(model: Any) -> Any:
    """The part before the head, if head(body(ids)) with the known scalings gives the model's own logits.

    Tried on a few tokens, because no attribute says what else a model does to its logits.
    """
    import torch

    body = getattr(model, model.base_model_prefix, None)
    if body is None or body is model or model.get_output_embeddings() is None:
        return None
    ids = torch.arange(8, device=model.device)[None] % int(_text_config(model).vocab_size)
    with torch.inference_mode():
        theirs = model(ids, use_cache=False).logits[0].float()
        hidden = getattr(body(ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None
        mine = _finish(model, model.get_output_embeddings()(hidden[0])).float()
    same = mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2)
    return body if same else None


def _kept(handle: _Handle, path: Path, vocab_size: int) -> ReferenceHead | None:
    """How this model's distributions are kept: by what goes into its head, else by its logits."""
    head, config = handle.head, _text_config(handle.model)
    dtype = dtype_name(handle.model.dtype)
    if dtype is None:
        return None
    plain = handle.body is not None and hasattr(head, "weight")
    weight = None
    if plain and getattr(head, "bias", None) is None and head.weight.ndim == 2:
        weight = find_weight(path, head.weight.detach())
    if weight is None:
        return ReferenceHead.of_logits(vocab_size)
    return ReferenceHead(
        kind="hidden",
        dtype=dtype,
        width=weight.columns,
        vocab_size=vocab_size,
        weight=weight,
        rounded=dtype != "float32",
        multiplier=getattr(config, "logit_scale", None) or 1.0,
        divisor=getattr(config, "logits_scaling", None) or 1.0,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _finish(model: Any, logits: Any) -> Any:
    """What models do to the head's output: Cohere multiplies, Granite divides, Gemma 2 caps softly."""
    config = _text_config(model)
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def _versions(on_cpu: bool) -> dict[str, str]:
    """What took part beside the distributions: threads or CUDA, libraries of quantized layers."""
    import torch

    found = {"threads": str(torch.get_num_threads())} if on_cpu else {"cuda": str(torch.version.cuda)}
    for name in _QUANTIZERS:
        if name in sys.modules:
            found[name] = importlib.metadata.version(name)
    return found


def _gpu_name(device: Any) -> str:
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else os.uname().machine
