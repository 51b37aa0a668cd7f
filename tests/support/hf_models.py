"""Tiny random transformers checkpoints of several architectures."""

from pathlib import Path
from typing import Any

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 128,
}
# Models that do something to their logits after the head, and one with a plain and a tied head each.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": False},
    "Qwen3Config": {"tie_word_embeddings": True, "head_dim": 8},
    "Gemma2Config": {
        "final_logit_softcapping": 5.0,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
    },
    "CohereConfig": {"logit_scale": 0.25},
    "GraniteConfig": {"logits_scaling": 3.0},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
# One with a state instead of a cache in most layers.
RECURRENT: dict[str, dict[str, Any]] = {
    "Qwen3NextConfig": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_hidden_layers": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint with random weights of one of the kinds above."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**TINY | (ARCHITECTURES | RECURRENT)[kind] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder
