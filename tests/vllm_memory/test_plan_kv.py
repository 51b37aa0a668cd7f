"""KV cache of architectures beyond the measured ones, and vLLM's blocks."""

import pytest
from cache_architectures import ARCHITECTURES, BASE, MAMBA, MAMBA2

from evalq.checkpoint.shape import make_shape
from evalq.errors import SpecError
from evalq.vllm_memory.kv import CacheLayer, cache_layers, layer_names
from evalq.vllm_memory.pool import make_pool


def shape(**changes):
    return make_shape("m", {k: v for k, v in (BASE | changes).items() if v is not None}, ())


def kinds(**changes) -> str:
    """One letter per layer: f, w(indow), c(hunk), s(tate), - for none."""
    layers = cache_layers(shape(**changes))
    return " ".join("".join(c.kind[0] for c in layer) or "-" for layer in layers).replace(" ", "")


@pytest.mark.parametrize(("changes", "expected"), ARCHITECTURES)
def test_which_layers_keep_what(changes, expected):
    assert kinds(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "jamba"} | MAMBA, (4096 * 3 + 4096 * 16) * 2),
        ({"model_type": "bamba"} | MAMBA2, ((4096 + 256) * 3 + 4096 * 128) * 2),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M" * 12} | MAMBA2,
         (4096 + 256) * 6 + 4096 * 128 * 4),
        ({"model_type": "lfm2", "full_attn_idxs": [11], "conv_L_cache": 3}, 2048 * 2 * 2),
        (
            {"model_type": "mamba2", "num_attention_heads": None, "num_heads": 64, "head_dim": 64,
             "n_groups": 1, "state_size": 128, "conv_kernel": 4},
            ((4096 + 256) * 3 + 4096 * 128) * 2,
        ),
    ],
)  # fmt: skip
def test_state_of_recurrent_layers(changes, expected):
    layers = cache_layers(shape(**changes))
    assert layers[0] == [CacheLayer("state", expected)]


def test_state_is_divided_among_gpus():
    one, two = (cache_layers(shape(model_type="bamba", **MAMBA2), tp=tp)[0][0].bytes for tp in (1, 2))
    assert one == 2 * two


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v32", "index_head_dim": 128}, "index_head_dim"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["rwkv"] * 12}, '"rwkv"'),
        ({"model_type": "gemma2"}, "sliding_window"),
        ({"model_type": "bamba", "attn_layer_indices": []}, "mamba_d_state or ssm_state_size"),
    ],
)
def test_what_is_not_known_is_refused(changes, named):
    with pytest.raises(SpecError, match=named) as found:
        cache_layers(shape(**changes))
    assert "\n" not in str(found.value)


def test_blocks_of_full_attention():
    pool = make_pool([[CacheLayer("full", 100)]] * 3, step_tokens=64)
    assert (pool.block_bytes, pool.block_tokens, len(pool.groups)) == (3 * 16 * 100, 16, 1)
    assert pool.tokens(10.9 * pool.block_bytes, 50, (0, 11)) == 160
    assert pool.sequences(10 * pool.block_bytes, 50) == 2.5
    assert pool.longest(10 * pool.block_bytes, 1000) == 160
    assert pool.longest(-5, 1000) == 0


def test_windows_keep_their_reach_and_a_step():
    layers = [[CacheLayer("window", 100, 128)], [CacheLayer("full", 100)]] * 2
    pool = make_pool(layers, step_tokens=64)
    assert len(pool.groups) == 2
    # ceil((127 + 64) / 16) + 1 of the window, 1000 / 16 of the others.
    assert pool.blocks_for(1000) == 13 + 63
    assert pool.blocks_for(16) == 2 + 1


def test_unequal_numbers_of_layers_make_several_groups():
    layers = [[CacheLayer("window", 100, 128)]] * 22 + [[CacheLayer("full", 100)]] * 4
    pool = make_pool(layers, step_tokens=64)
    assert pool.block_bytes == 4 * 16 * 100
    assert [g.kind for g in pool.groups].count("window") == 6
    nearly = make_pool([[CacheLayer("window", 100, 128)]] * 12 + [[CacheLayer("full", 100)]] * 13, 64)
    assert (len(nearly.groups), nearly.block_bytes) == (2, 13 * 16 * 100)


def test_attention_blocks_grow_to_a_state():
    layers = [[CacheLayer("state", 10_000)], [CacheLayer("full", 100)]]
    pool = make_pool(layers, step_tokens=64)
    assert pool.block_tokens == 112
    assert pool.block_bytes == 11_200
    assert pool.blocks_for(200) == 1 + 2
    only = make_pool([[CacheLayer("state", 10_000)]] * 4, 64)
    assert only.sequences(400_000, 5) == 10


def test_tokens_are_counted_as_the_version_does():
    pool = make_pool([[CacheLayer("window", 100, 128)], [CacheLayer("full", 100)]], 64)
    blocks = 100 * pool.block_bytes
    assert pool.tokens(blocks, 1000, (0, 11)) == 50 * 16
    assert pool.tokens(blocks, 1000, (0, 32)) == int(100 / 76 * 1000)


def test_names_fall_back_to_full_attention():
    assert layer_names(shape(model_type="something_new")) == ["full_attention"] * 12
