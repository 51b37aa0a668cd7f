"""Adapters on CUDA engines: base with adapter gives what transformers gives with the adapter merged.

    pytest -m gpu tests/backends/test_lora_gpu.py

needs a CUDA GPU, transformers, and vLLM or exllamav3 or both.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs
from gpu_models import make_model
from lora_adapters import merged, write_peft

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("engine", ["vllm", "exl3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_base_with_adapter_equals_merged(runs: Runs, engine: str, rslora: bool) -> None:
    package = {"exl3": "exllamav3"}.get(engine, engine)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    base = make_model(runs.folder / "base")
    adapter = write_peft(runs.folder / "adapter", base, std=0.1, use_rslora=rslora)
    options: dict[str, Any] = {"gpu_memory_utilization": 0.2} if engine == "vllm" else {}
    model = {"load_fn": engine, "fwd_fn": engine, "model_dir": str(base), "options": options}
    whole = merged(base, adapter, runs.folder / "merged")
    fp32 = {"load_fn": "hf", "fwd_fn": "hf", "model_dir": str(whole), "options": {"dtype": "float32"}}
    models = runs.models(
        model | {"label": "base"},
        model | {"label": "base", "lora": lora(adapter)},
        fp32 | {"label": "merged"},
    )
    code, (plain, added, reference) = runs.compare(runs.data(), models)
    assert code == 0, [record["error"] for record in (plain, added, reference)]
    assert added["ppl"] == pytest.approx(reference["ppl"], rel=3e-3)
    assert abs(added["ppl"] / plain["ppl"] - 1) > 0.02
    assert added["format"].endswith("+ LoRA r8")


def lora(adapter: Path) -> dict[str, str]:
    return {"path": str(adapter), "name": "tuned"}
