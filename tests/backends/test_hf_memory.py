"""What the transformers backend is expected to take of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalq.backends._hf_memory import plan_transformers
from evalq.checkpoint.shape import read_shape


def test_transformers_runs_dequantized(smollm2: Callable[[str], Path]):
    plans: dict[str, Any] = {
        name: plan_transformers(read_shape(str(smollm2(name))), 4.0, batch_tokens=2048)
        for name in ("bf16", "int4")
    }
    assert plans["int4"].weights_gib == pytest.approx(plans["bf16"].weights_gib, rel=0.01)
    wide = plan_transformers(read_shape(str(smollm2("bf16"))), 4.0, 2048, dtype="float32")
    assert wide.weights_gib == pytest.approx(2 * plans["bf16"].weights_gib, rel=1e-6)
    assert plans["bf16"].fits and plans["bf16"].category is None
    small = plan_transformers(read_shape(str(smollm2("bf16"))), 0.5, batch_tokens=2048)
    assert not small.fits
    assert small.category == "oom_load"
    assert small.verdict.startswith("does not load: 0.25 GiB of weights and ")
