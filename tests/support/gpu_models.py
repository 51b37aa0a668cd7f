"""Random models for the tests that need a GPU, sized for tensor parallelism and exllamav3's blocks of 128."""

from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def make_model(folder: Path, **sizes: int) -> Path:
    """A random Llama in bfloat16.

    Args:
        folder: to be made.
        sizes: instead of SMALL's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    given: dict[str, Any] = SMALL | sizes
    config = LlamaConfig(
        **given,
        vocab_size=512,
        num_attention_heads=given["hidden_size"] // 64,
        num_key_value_heads=given["hidden_size"] // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
