"""Which part of a model a logical weight belongs to, from its name and number of dimensions.

Names are Hugging Face's and GGUF's; the rules are those of the convention in `evalq.checkpoint.bits`.
"""

from evalq.checkpoint.bits import Kind

_HEAD_MODULES = ("lm_head", "embed_out")
_HEAD_NAMES = ("output.weight", "head.weight")
_ROUTER_ENDS = (
    ".mlp.gate.weight",
    ".block_sparse_moe.gate.weight",
    ".router.weight",
    ".feed_forward.gate.weight",
    "ffn_gate_inp.weight",
)
_EMBEDDING_PARTS = ("embed", "embd")
_EMBEDDING_MODULES = frozenset({"wte", "wpe"})
_BIAS_ENDS = (".bias", "_bias")
# Masks, position tables and KV-cache scales: no engine multiplies by them.
_BUFFER_ENDS = (
    ".masked_bias",
    ".position_ids",
    ".inv_freq",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    "rope_freqs.weight",
)


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is no parameter: a mask, a table, a KV-cache scale."""
    return name.endswith(_BUFFER_ENDS)


def kind_of(name: str, dimensions: int) -> Kind:
    """Sort a logical weight into its part.

    Args:
        name: of the logical weight; sidecars are sorted with their weight and never come here.
        dimensions: of the logical weight (2 for a packed linear layer).
    """
    if name.endswith(_BIAS_ENDS) or is_buffer(name):
        return "other"
    parts = name.split(".")
    if dimensions < 2:
        return "norm" if "norm" in name or parts[-2:-1] and parts[-2].startswith("ln") else "other"
    if name in _HEAD_NAMES or any(module in parts[-2:] for module in _HEAD_MODULES):
        return "head"
    if any(part in name for part in _EMBEDDING_PARTS) or not _EMBEDDING_MODULES.isdisjoint(parts):
        return "embedding"
    if name.endswith(_ROUTER_ENDS):
        return "router"
    return "layer"
