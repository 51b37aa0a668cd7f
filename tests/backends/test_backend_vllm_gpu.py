"""vLLM on CUDA GPUs: its scores, what it says when memory is short, what it leaves behind.

    pytest -m gpu tests/backends/test_backend_vllm_gpu.py

in an environment with evalq, transformers and a CUDA build of vLLM; about three minutes. The models are small
and random, made here.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import headers_only
from conftest import Runs
from gpu_models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.filterwarnings("default")]

SETTLE_SECONDS = 20.0
LEFT_MIB = 64
SHARE = {"gpu_memory_utilization": 0.2}


def query(what: str) -> list[str]:
    """Lines of nvidia-smi, one per GPU or process."""
    command = ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def used_mib() -> int:
    return sum(map(int, query("gpu=memory.used")))


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    if not gpu_count():
        pytest.skip("no CUDA GPU")


@pytest.fixture(autouse=True)
def nothing_left(cuda: None) -> Iterator[None]:
    """Every test gives back the memory it took."""
    before = used_mib()
    yield
    wait_for(lambda: used_mib() <= before + LEFT_MIB, SETTLE_SECONDS, f"{used_mib() - before} MiB of the GPU")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, cuda: None) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu") / "small")


def spec(path: Path, label: str, load_fn: str = "vllm", **options: Any) -> dict[str, Any]:
    options = SHARE | options if load_fn == "vllm" else options
    return {"load_fn": load_fn, "fwd_fn": load_fn, "model_dir": str(path), "label": label, "options": options}


def failure(runs: Runs, model: dict[str, Any], more: tuple[str, ...] = ("--try-anyway",)) -> dict[str, Any]:
    """Why a model failed; the engine is started whatever was predicted."""
    code, (record,) = runs.compare(runs.data(), runs.models(model), more=more)
    assert code == 1 and record["status"] == "failed"
    return dict(record["error"])


def test_scores_are_those_of_transformers(runs: Runs, small: Path) -> None:
    models = runs.models(spec(small, "ours"), spec(small, "theirs", "hf", dtype="float32"))
    code, (ours, theirs) = runs.compare(runs.data(), models)
    assert code == 0, (ours["error"], theirs["error"])
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=2e-3)
    memory = ours["execution"]["memory"]
    assert 0 < memory["weights_gib"] < 0.1 < memory["kv_cache_gib"]
    assert memory["requested_gib"] == pytest.approx(0.2 * memory["device_total_gib"], rel=1e-3)
    assert ours["peak_memory_gib"] < memory["device_total_gib"]


def start_and_kill(runs: Runs, model: dict[str, Any]) -> str:
    """What the command says after its worker was killed while it scored."""
    data = runs.data(eval_stride=8, max_rows=None)
    process = runs.process("-d", str(data), "-m", str(runs.models(model)))
    parts = runs.folder / "store" / "results"
    wait_for(lambda: list(parts.glob("*/parts/*.safetensors")) or process.poll(), 180, "a first window")
    (worker,) = psutil.Process(process.pid).children()
    family = [worker, *worker.children(recursive=True)]
    worker.send_signal(signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    ids = {str(one.pid) for one in family}
    wait_for(lambda: not ids & set(query("compute-apps=pid")), SETTLE_SECONDS, "the driver to forget them")
    assert list(parts.glob("*/parts/*.safetensors")), "what was scored is kept"
    return out + errors


def test_a_killed_engine_leaves_no_process_and_no_memory(runs: Runs, small: Path) -> None:
    assert "host_oom_or_killed" in start_and_kill(runs, spec(small, "killed"))


def test_too_small_a_share_leaves_no_kv_cache(runs: Runs, small: Path) -> None:
    model = spec(small, "share", gpu_memory_utilization=0.0005)
    predicted = failure(runs, model, more=())
    assert predicted["category"] == "no_kv_memory" and "predicted, not tried" in predicted["message"]
    found = failure(runs, model)
    assert found["category"] == "no_kv_memory", found
    assert "predicted" not in found["message"] and "gpu_memory_utilization" in found["remedy"]


def test_a_length_that_the_cache_does_not_hold(runs: Runs, small: Path) -> None:
    error = failure(runs, spec(small, "long", gpu_memory_utilization=0.02, max_model_len=10_000_000))
    assert error["category"] == "max_len_too_large", error


def test_a_model_larger_than_the_gpu(runs: Runs, tmp_path: Path) -> None:
    """Its files are holes, and the engine is told to invent the weights."""
    model = headers_only(tmp_path / "huge", 200)
    error = failure(runs, spec(model, "huge", load_format="dummy"))
    assert error["category"] == "oom_load", error


@contextmanager
def other_process_holds(share: float) -> Iterator[None]:
    """Another program with that share of the first GPU's memory."""
    code = (
        "import sys, torch\n"
        "total = torch.cuda.mem_get_info()[1]\n"
        "kept = torch.empty(int(total * float(sys.argv[1])), dtype=torch.uint8, device='cuda')\n"
        "print('holds it', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: Any = subprocess.Popen([sys.executable, "-c", code, str(share)], **pipes)
    try:
        assert process.stdout.readline().strip() == "holds it"
        yield
    finally:
        process.communicate()


def test_a_gpu_that_others_use(runs: Runs, small: Path) -> None:
    with other_process_holds(0.6):
        error = failure(runs, spec(small, "busy", gpu_memory_utilization=0.8))
    assert error["category"] == "gpu_busy", error


def test_more_gpus_than_there_are(runs: Runs, small: Path) -> None:
    count = gpu_count()
    error = failure(runs, spec(small, "wide", tensor_parallel_size=count + 1))
    assert error["category"] == "bad_option"
    assert f"this machine has {count} GPU" in error["message"]


@pytest.fixture
def two_gpus() -> None:
    if gpu_count() < 2:
        pytest.skip("one GPU")


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_give_the_scores_of_one(runs: Runs, small: Path, two_gpus: None, split: str) -> None:
    # How a model is split is no part of a result's identity: one store would answer for both.
    found = []
    for options in ({}, {split: 2}):
        models, store = runs.models(spec(small, "model", **options)), f"store-{len(found)}"
        code, (record,) = runs.compare(runs.data(), models, more=("--store", store))
        assert code == 0, record["error"]
        found.append(record)
    one, two = found
    assert two["ppl"] == pytest.approx(one["ppl"], rel=2e-3)
    assert two["execution"]["device"].startswith("cuda 2 x")


def test_a_killed_engine_on_two_gpus_leaves_nothing(runs: Runs, small: Path, two_gpus: None) -> None:
    assert "host_oom_or_killed" in start_and_kill(runs, spec(small, "killed", tensor_parallel_size=2))
