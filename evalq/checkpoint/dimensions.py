"""The sides that config.json gives to the linear layers of a transformer, by the module's name.

Names and settings as in transformers' Llama and the many models that follow it
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama).
"""

from typing import Any


def side_lengths(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Possible lengths of the named sides; several where layers differ (experts), none where it is silent."""

    def number(key: str) -> int:
        value = config.get(key)
        return value if type(value) is int and value > 0 else 0

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") or (hidden // heads if heads else 0)
    kv_heads = number("num_key_value_heads") or heads
    moe = number("moe_intermediate_size")
    inner = (
        number("intermediate_size"),
        moe,
        number("shared_expert_intermediate_size"),
        moe * number("n_shared_experts"),
    )
    return {
        "hidden": (hidden,),
        "query": (heads * head_dim,),
        "key": (kv_heads * head_dim,),
        "inner": tuple(n for n in dict.fromkeys(inner) if n),
    }


# Module name -> its (in, out) sides.
SIDES = {
    "q_proj": ("hidden", "query"), "k_proj": ("hidden", "key"), "v_proj": ("hidden", "key"),
    "o_proj": ("query", "hidden"), "gate_proj": ("hidden", "inner"), "up_proj": ("hidden", "inner"),
    "down_proj": ("inner", "hidden"), "w1": ("hidden", "inner"), "w3": ("hidden", "inner"),
    "w2": ("inner", "hidden"),
}  # fmt: skip
