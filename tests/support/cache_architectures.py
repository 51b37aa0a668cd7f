"""Configurations of twelve layers, each with one letter per layer for what it keeps.

f(ull attention), w(indow), c(hunk), s(tate), - for none.
"""

BASE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {
    "mamba_n_heads": 64,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
}

ARCHITECTURES = [
    ({}, "f" * 12),
    ({"model_type": "mistral", "sliding_window": 4096}, "w" * 12),
    ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, "f" * 12),
    (
        {
            "model_type": "qwen2",
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 8,
        },
        "f" * 8 + "w" * 4,
    ),
    ({"model_type": "gemma2", "sliding_window": 4096}, "wf" * 6),
    ({"model_type": "gemma3_text", "sliding_window": 512}, "wwwwwf" * 2),
    ({"model_type": "cohere2", "sliding_window": 4096, "sliding_window_pattern": 4}, "wwwf" * 3),
    ({"model_type": "gpt_oss", "sliding_window": 128}, "wf" * 6),
    ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "cccf" * 3),
    ({"layer_types": ["sliding_attention", "full_attention"] * 6, "sliding_window": 64}, "wf" * 6),
    ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 2} | MAMBA, "ssfs" * 3),
    ({"model_type": "bamba", "attn_layer_indices": [3, 7]} | MAMBA2, "sssfsssfssss"),
    ({"model_type": "falcon_h1"} | MAMBA2, "fs" * 12),
    ({"model_type": "lfm2", "full_attn_idxs": [2, 5], "conv_L_cache": 3}, "ssfssfssssss"),
    ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*M-M*M-M-"} | MAMBA2, "s-sfs-sfs-s-"),
]
