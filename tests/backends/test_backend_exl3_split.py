"""exl3 over several CUDA GPUs: layers spread by gpu_split give the scores of one GPU.

    pytest -m gpu tests/backends/test_backend_exl3_split.py

needs two GPUs and exllamav3. The model is small, random and unquantized, made here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_batches
from gpu_models import make_model

from evalq.backends.exl3 import Exl3Backend
from evalq.engine.backend import Batch, LoadedModel, LoadRequest

EXL3 = Exl3Backend()

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    # 12 layers of 80 MiB, so that 0.6 GiB of a first GPU hold some of them and not all.
    folder = tmp_path_factory.mktemp("split") / "model"
    return make_model(folder, hidden_size=2048, intermediate_size=4096, num_hidden_layers=12)


def loaded(path: Path, **options: Any) -> LoadedModel:
    return EXL3.load(LoadRequest(path, 512, 511, options, n_windows=4))


def test_layers_over_two_gpus_give_the_scores_of_one(model_dir: Path) -> None:
    ids = np.random.default_rng(7).integers(0, 512, (4, 512))
    batches = [Batch(ids[:2], 1), Batch(ids[2:], 101)]
    one, two = loaded(model_dir), loaded(model_dir, gpu_split=[0.6, 8])
    devices = {str(module.device) for module in two.handle.model.modules[1:]}
    assert devices == {"cuda:0", "cuda:1"}
    for a, b in zip(score_batches(EXL3, one, batches), score_batches(EXL3, two, batches), strict=True):
        assert a["logprob"].shape == b["logprob"].shape
        assert (
            np.allclose(a["logprob"], b["logprob"], atol=0.05)
            and abs((a["logprob"] - b["logprob"]).mean()) < 2e-4
        )
    EXL3.close(one)
    EXL3.close(two)
