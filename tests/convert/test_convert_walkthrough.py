"""The walk-through of docs/lora.md, as it stands there: train an adapter, merge it, compare."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from evalq.checkpoint.adapter import read_adapter
from evalq.engine.backend import Batch, LoadRequest
from evalq.spec import load_model_specs

TEXT = (ROOT / "docs" / "lora.md").read_text()

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:You passed `quantization_config`")]


def shell(command: str, folder: Path) -> str:
    """Run commands as in a terminal with the environment active; what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: small matrices on a machine where other tests run.
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def walked(smollm2: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the walk-through was carried out; its output is in output.txt."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "demo").symlink_to(ROOT / "demo")
    (folder / "models" / "smollm2").mkdir(parents=True)
    for name in ("bf16", "int4", "SmolLM2-135M-Instruct.Q4_1.gguf"):
        (folder / "models" / "smollm2" / name).symlink_to(smollm2(name))
    for name, content in re.findall(r"^`(\w+\.json)`:\n\n```json\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(content)
    prepare, compare = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    output = shell(prepare, folder)
    output += shell(f"export EVALQ_STORE=store\n{compare.strip()} --json records.json", folder)
    (folder / "output.txt").write_text(output)
    return folder


def test_base_and_base_with_adapter_are_two_points(walked: Path) -> None:
    records = {record["label"]: record for record in json.loads((walked / "records.json").read_text())}
    assert list(records) == ["INT4", "INT4 + style", "Merged"]
    base, on_top, merged = (record["ppl"] for record in records.values())
    assert on_top < 0.95 * base
    assert merged == pytest.approx(on_top, rel=3e-3)
    assert records["INT4 + style"]["layer_bpw"] > records["INT4"]["layer_bpw"]
    assert (walked / "lora.png").stat().st_size > 10_000
    output = (walked / "output.txt").read_text()
    assert re.search(r"LoRA +yes, on .*q_proj", output)
    assert "INT4 + style" in output


def test_merged_scores_are_those_of_base_and_adapter(walked: Path) -> None:
    int4, adapter = walked / "models" / "smollm2" / "int4", walked / "adapters" / "style"
    shell(f"evalq merge-lora {int4} {adapter} models/exact --dtype float32", walked)
    on_top = scores(int4, adapter)
    np.testing.assert_allclose(scores(walked / "models" / "exact"), on_top, atol=2e-3)


def scores(path: Path, adapter: Path | None = None) -> np.ndarray:
    """Log-probabilities of 127 tokens in float32 on the hf backend."""
    from evalq.backends.hf import HfBackend

    engine = HfBackend()
    options = {"threads": 1, "dtype": "float32"}
    on_top = None if adapter is None else read_adapter(adapter)
    model = engine.load(LoadRequest(path, 128, 127, options, adapter=on_top))
    (found,) = engine.score(model, [Batch(np.arange(1000, 1000 + 128 * 37, 37)[None], 1)])
    engine.close(model)
    return found["logprob"]


def test_every_spec_of_the_page_is_valid(tmp_path: Path) -> None:
    specs = [block for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL) if '"load_fn"' in block]
    assert len(specs) == 2
    for block in specs:
        (tmp_path / "models.json").write_text(block)
        models = load_model_specs(tmp_path / "models.json")
        assert [model.lora is not None for model in models][:2] == [False, True]
