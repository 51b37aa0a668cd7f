"""LoRA adapters in vLLM: which ranks it has room for, and what its version would get wrong.

Source: https://docs.vllm.ai/en/latest/features/lora/
"""

from typing import Any

from evalq.checkpoint.adapter import Adapter
from evalq.errors import ModelError
from evalq.vllm_memory.plan_settings import LORA_RANKS

# Older versions know no room for rank 1.
RANKS = tuple(rank for rank in LORA_RANKS if rank >= 8)


def lora_arguments(adapter: Adapter) -> dict[str, Any]:
    """Engine arguments that make room for an adapter. Raises ModelError (bad_adapter)."""
    fitting = [rank for rank in RANKS if adapter.rank <= rank]
    if not fitting:
        raise ModelError(
            f"adapter {adapter.name} has rank {adapter.rank}, vLLM takes up to {RANKS[-1]}",
            "bad_adapter",
            'merge it into the base ("evalq merge-lora")',
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": fitting[0],
        # A wrapped head expects one row per request and breaks on the rows of prompt log-probabilities
        # (https://github.com/vllm-project/vllm/issues/51594).
        "lora_target_modules": sorted({module.rpartition(".")[2] for module in adapter.shapes}),
    }


def check_adapter(adapter: Adapter, version: str) -> None:
    """Raise ModelError (bad_adapter) for what the installed vLLM would not apply as it was trained."""
    from vllm.lora.peft_helper import PEFTHelper

    # Versions without this method scale every module by the adapter's default rank and alpha.
    patterns = {"rank_pattern", "alpha_pattern"}.intersection(adapter.features)
    if patterns and not hasattr(PEFTHelper, "get_rank_and_scaling"):
        raise ModelError(
            f"adapter {adapter.name} uses {' and '.join(sorted(patterns))}, which vLLM {version} ignores",
            "bad_adapter",
            'update vLLM, or merge the adapter into the base ("evalq merge-lora")',
        )


def lora_request(adapter: Adapter | None) -> Any:
    """vllm.LoRARequest of every window; None without an adapter."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, 1, str(adapter.path))
