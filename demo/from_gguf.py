"""What is made from the GGUF file itself: a dense Hugging Face checkpoint, and GGUF files of other types.

Both start from the file's 4-bit weights, so all of them carry its rounding and none is the model as it was
trained: they show what each format adds to the same starting point.
"""

import ctypes
from pathlib import Path

import llama_cpp
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from evalq.errors import EvalqError

# Whitespace before digits, digits that are no ASCII, contractions, runs of newlines: where pre-tokenizers
# differ.
TOKENIZER_PROBE = "It's 1,024 of 4 ½ or x² (Ⅷ) : \n\n\n 1 don't\t\t2 = = Café = = \n 日本 — 12th\n\n"

# llama.cpp writes its progress to stderr unless it has a callback; ctypes needs this one to stay alive.
_DISCARD_LOG = llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def write_bf16_checkpoint(gguf_path: Path, out: Path) -> None:
    """Write the GGUF's weights, dequantized, as a BF16 checkpoint with its tokenizer.

    The weights go into a fresh model: transformers refuses to save one that came from a GGUF.

    Raises:
        EvalqError: the tokenizer made from the GGUF and llama.cpp's own disagree.
    """
    source = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    config = source.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):  # no time spent on random weights
        model = AutoModelForCausalLM.from_config(type(source.config).from_dict(config), dtype=torch.bfloat16)
    weights = {name: weight.to(torch.bfloat16) for name, weight in source.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    _write_tokenizer(gguf_path, out)


def _write_tokenizer(gguf_path: Path, out: Path) -> None:
    """Save the GGUF's tokenizer, with the pre-tokenizer that SmolLM was trained with.

    transformers gives every GPT-2-like vocabulary of a GGUF the pre-tokenizer of GPT-2. SmolLM's also
    splits off every digit first, which llama.cpp knows by the name "smollm" (`src/llama-vocab.cpp`); without
    it, whitespace before a digit comes out as other tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)
    written = AutoTokenizer.from_pretrained(out)
    ours = written(TOKENIZER_PROBE, add_special_tokens=False).input_ids
    theirs = gguf_token_ids(gguf_path, TOKENIZER_PROBE)
    if ours != theirs:
        raise EvalqError(
            f"{out}: the tokenizers of transformers and llama.cpp give different tokens: {ours} and {theirs}",
            "install the versions of constraints.txt",
        )


def gguf_token_ids(gguf_path: Path, text: str) -> list[int]:
    """Tokenize with the tokenizer inside a GGUF, no special tokens added or recognised."""
    llama_cpp.llama_log_set(_DISCARD_LOG, ctypes.c_void_p(0))
    vocabulary = llama_cpp.Llama(str(gguf_path), vocab_only=True, verbose=False)
    try:
        return list(vocabulary.tokenize(text.encode(), add_bos=False, special=False))
    finally:
        vocabulary.close()


def requantize_gguf(source: Path, out: Path, type_name: str) -> None:
    """Write a GGUF file of another type with llama.cpp.

    Args:
        source: any GGUF file; its weights are dequantized first.
        out: the file to write.
        type_name: as llama.cpp names its file types, "Q8_0", "F16".

    Raises:
        EvalqError: llama.cpp could not write the file.
    """
    llama_cpp.llama_log_set(_DISCARD_LOG, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if status != 0:
        raise EvalqError(f"{out}: llama.cpp could not write {type_name} (status {status})")
