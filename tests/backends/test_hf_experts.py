"""Which experts routers choose, counted while a model runs, beside the model's own router logits."""

from typing import Any

import numpy as np
import pytest

from evalq.backends._hf_experts import ExpertCounter

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "vocab_size": 258,
    "eos_token_id": 257,
    "pad_token_id": None,
}
EXPERTS = 24
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "Qwen2MoeConfig": {
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3MoeConfig": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "OlmoeConfig": {"num_experts": EXPERTS, "num_experts_per_tok": 3},
    "GptOssConfig": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "GraniteMoeConfig": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "DeepseekV2Config": {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "topk_method": "greedy",
        "first_k_dense_replace": 0, "moe_intermediate_size": 16, "n_shared_experts": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "head_dim": 8,
    },
    "Llama4TextConfig": {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    },
}  # fmt: skip


def make(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, kind)(**SIZES | MIXTURES.get(kind, {}))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def chosen(model: Any, ids: Any, top_k: int) -> list[np.ndarray]:
    """How many tokens each expert of each layer is given, by the model's own router logits."""
    import torch

    with torch.inference_mode():
        found = model(ids, output_router_logits=True, use_cache=False).router_logits
    return [
        np.bincount(logits.reshape(-1, EXPERTS).topk(top_k).indices.flatten(), minlength=EXPERTS)
        for logits in found
    ]


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_counts_are_those_of_the_router_logits(kind: str) -> None:
    import torch

    model = make(kind)
    ids = torch.arange(60).reshape(3, 20)
    expected = chosen(model, ids, MIXTURES[kind]["num_experts_per_tok"])
    counter = ExpertCounter(model)
    with torch.inference_mode():
        for part in (ids[:1], ids[1:]):
            model(part, use_cache=False)
    found = counter.take()
    assert len(found) == len(expected) == 2
    for (name, one), counts in zip(found.items(), expected, strict=True):
        assert name.endswith(".experts") and one.tokens == 60
        assert one.counts.tolist() == counts.tolist()
    assert 0 < sum(np.count_nonzero(one.counts) for one in found.values()) < 2 * EXPERTS
    assert counter.take() == {}, "taken once"


def test_counting_changes_no_number() -> None:
    import torch

    model, ids = make("MixtralConfig"), torch.arange(40)[None]
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        ExpertCounter(model)
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_dense_model_has_nothing_to_count() -> None:
    import torch

    model = make("LlamaConfig")
    counter = ExpertCounter(model)
    with torch.inference_mode():
        model(torch.arange(20)[None])
    assert counter.take() == {}
