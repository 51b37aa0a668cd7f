# ruff: noqa: E501
"""Why a run failed, with the figures of its message, and what to do."""

from pathlib import Path

import pytest

from evalq.engine.failures import CATEGORIES
from evalq.vllm_memory.engine_run import EngineRun
from evalq.vllm_memory.reader import read_logs

LOGS = Path(__file__).parent / "logs"
START = "INFO 11-21 02:38:56 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='m', max_seq_len=512\n"
READY = "INFO 11-21 02:39:00 [core.py:347] init engine (profile, create kv cache, warmup model) took 1.97 s\n"


def runs(name: str) -> list[EngineRun]:
    return read_logs([str(LOGS / f"{name}.log")])


def from_text(tmp_path: Path, text: str) -> EngineRun:
    path = tmp_path / "some.log"
    path.write_text(START + text)
    (only,) = read_logs([str(path)])
    return only


@pytest.mark.parametrize(
    ("name", "category", "words"),
    [
        ("real-0.28-cpu-nvfp4", "unsupported_format", "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported"),
        ("real-0.32-cpu-nvfp4", "unsupported_format", "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported"),
        ("real-0.32-cpu-unknown-architecture", "unsupported_format", "ValueError: The checkpoint you are trying to load has model type `foo`"),
        ("real-0.28-cpu-too-long", "max_len_too_large", "max seq len (8192), (0.18 GiB KV"),
        ("real-0.32-cpu-too-long", "max_len_too_large", "max seq len (8192), (0.18 GiB KV"),
        ("real-0.32-cpu-busy", "gpu_busy", "Available memory on node 0 (14.22/15.71 GiB)"),
        ("real-0.32-cpu-tp-does-not-divide", "bad_option", "heads (9) must be divisible by tensor parallel size (2)"),
        ("real-0.32-cpu-beyond-positions", "bad_option", "max_model_len (99999) is greater than the derived"),
        ("real-0.32-cpu-killed", "host_oom_or_killed", "a process was killed, or the log lacks its lines"),
        ("real-0.32-cpu-killed-core", "host_oom_or_killed", "a process was killed, or the log lacks its lines"),
        ("written-0.8.5-too-long", "max_len_too_large", "models's max seq len (131072)"),
        ("written-0.8.5-v0-too-long", "max_len_too_large", "stored in KV cache (41936)"),
        ("written-0.9.2-a100-mixtral", "oom_load", "Tried to allocate 896.00 MiB"),
        ("written-0.11-busy", "gpu_busy", "Free memory on device (3.22/4.0 GiB)"),
        ("written-0.12-oom-serving", "oom_forward", "Tried to allocate 1.16 GiB"),
        ("written-0.14-a100-scout", "oom_load", "CUDA out of memory. Tried to allocate 640.00 MiB"),
    ],
)  # fmt: skip
def test_category_and_words(name: str, category: str, words: str) -> None:
    (found,) = runs(name)
    assert found.failure is not None and found.status == "failed"
    assert found.category == category and words in found.failure.message
    line = (LOGS / f"{name}.log").read_bytes().decode().split("\n")[found.failure.line - 1]
    assert "Error" in line or "Exception" in line or "Failed to load" in line
    assert CATEGORIES[category].remedy in found.recommendations or category == "max_len_too_large"


@pytest.mark.parametrize(
    ("name", "tried", "free", "in_use", "pytorch", "total"),
    [
        ("written-0.18-h100", 3.50, 3.33, 75.84, 75.16, 79.18),
        ("written-0.9.2-a100-mixtral", 896 / 1024, 787.44 / 1024, 38.72, 38.20, 39.49),
        ("written-0.14-a100-scout", 640 / 1024, 501.44 / 1024, 39.00, 38.51, 39.49),
    ],
)
def test_figures_when_memory_ran_out(
    name: str, tried: float, free: float, in_use: float, pytorch: float, total: float
) -> None:
    found = runs(name)[0]
    said = found.failure
    assert said is not None
    assert (said.tried_gib, said.free_gib) == (pytest.approx(tried), pytest.approx(free))
    assert (said.in_use_gib, said.pytorch_gib, found.device.total_gib) == (in_use, pytorch, total)
    assert f"evalq plan {found.engine.model} --gpu-memory {total:g}" in found.recommendations[0]


def test_qwen3_next_on_16_gb_fails_in_four_ways() -> None:
    found = runs("written-0.11-16gb-qwen3-next")
    assert [r.category for r in found] == ["oom_load", "oom_load", "offload_unsupported", "no_gpu"]
    offloaded = found[2]
    assert (offloaded.memory.weights_gib, offloaded.memory.kv_cache_gib) == (1.19, 11.94)
    assert (offloaded.seconds.load, offloaded.cache.tokens) == (57.69, 122_368)


def test_no_memory_for_the_cache_names_the_utilization_that_is_needed() -> None:
    found = runs("written-0.18-h100")[3]
    assert found.category == "no_kv_memory"
    # (71.26 + 1.44) / 79.18 = 0.9182, 78.57 / 79.18 = 0.9923
    assert "above 0.919; 0.992 is all that was free" in found.recommendations[0]


def test_negative_cache_is_a_failure_without_its_exception(tmp_path: Path) -> None:
    found = from_text(
        tmp_path, "INFO 11-21 02:39:00 [gpu_worker.py:560] Available KV cache memory: -1.44 GiB\n"
    )
    assert (found.status, found.category, found.memory.kv_cache_gib) == ("failed", "no_kv_memory", -1.44)


def test_the_length_that_fits() -> None:
    assert "max_model_len=4352 " in runs("real-0.32-cpu-too-long")[0].recommendations[0]
    assert "max_model_len=41936 " in runs("written-0.8.5-v0-too-long")[0].recommendations[0]
    # 131072 * 5.12 / 16 = 41943.04, in whole blocks of 16
    (estimated,) = runs("written-0.8.5-too-long")[0].recommendations
    assert estimated == "max_model_len=41936 fits, from 5.12 of 16 GiB"


@pytest.mark.parametrize(("name", "share"), [("real-0.32-cpu-busy", "0.90"), ("written-0.11-busy", "0.80")])
def test_a_busy_device_names_the_utilization_that_fits(name: str, share: str) -> None:
    assert f"gpu_memory_utilization={share} fits" in runs(name)[0].recommendations[0]


def test_memory_that_ran_out_after_loading_is_not_the_weights_fault(tmp_path: Path) -> None:
    found = from_text(
        tmp_path,
        "INFO 11-21 02:38:58 [model_runner.py:305] Model loading took 70.1 GiB and 9.166687 seconds\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
    )
    assert found.category == "oom_load" and "the weights were loaded (70.10 GiB)" in found.recommendations[0]


@pytest.mark.parametrize(
    ("last", "category", "words"),
    [
        ("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': -9}", "host_oom_or_killed", "SIGKILL"),
        ("ERROR 11-21 02:38:58 [a.py:1] Worker proc VllmWorker-0 died unexpectedly (exit code: -11), shutting down executor.", "crashed", "SIGSEGV"),
        ("ERROR 11-21 02:38:58 [a.py:120] Worker VllmWorkerProcess pid 12 died, exit code: -9", "host_oom_or_killed", "SIGKILL"),
        ("run.sh: line 3:  1234 Killed                  vllm serve m", "host_oom_or_killed", "SIGKILL"),
        ("Killed", "host_oom_or_killed", "SIGKILL"),
        ("Fatal Python error: Segmentation fault", "crashed", "SIGSEGV"),
        ("RuntimeError: Failed to infer device type, please set the environment variable", "no_gpu", "infer device type"),
        ("ValueError: The worker already uses 5.11 GiB (model weights and runtime), more than the 4.71 GiB of CPU memory reserved for it on node 0, leaving none for the KV cache.", "no_kv_memory", "5.11 GiB"),
        ("ValueError: Available memory on node 0 (3.2/15.7 GiB) on kv cache allocation is less than requested memory for kv (4.0 GiB).", "no_kv_memory", "node 0"),
        ("KeyError: 'layers.0.mlp'", "engine_error", "layers.0.mlp"),
    ],
)  # fmt: skip
def test_ends_without_a_cause_above(tmp_path: Path, last: str, category: str, words: str) -> None:
    found = from_text(tmp_path, last + "\n")
    assert found.failure is not None
    assert found.category == category and words in found.failure.message and found.failure.line == 2


def test_an_exception_that_vllm_got_over_is_no_failure(tmp_path: Path) -> None:
    refused = "ERROR 11-21 02:39:09 [serving.py:1] ValueError: the prompt is not supported\n"
    assert from_text(tmp_path, f"ImportError: no module\n{READY}").status == "success"
    assert from_text(tmp_path, READY + refused).status == "success"
    died = from_text(tmp_path, f"{READY}{refused.replace('not supported', 'odd')}EngineDeadError: x\n")
    assert died.status == "failed" and died.category == "engine_error"


def test_a_root_cause_of_another_process_goes_before_what_reports_it(tmp_path: Path) -> None:
    found = from_text(
        tmp_path,
        "(Worker_TP1 pid=2) KeyError: 'first'\n"
        "(Worker_TP0 pid=1) RuntimeError: No CUDA GPUs are available\n"
        "(EngineCore pid=3) Exception: WorkerProc initialization failed. See stack trace for root cause.\n",
    )
    assert found.category == "no_gpu", "a message that is known goes before one that is not"
