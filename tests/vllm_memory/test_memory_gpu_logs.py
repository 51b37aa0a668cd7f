"""Logs that vLLM 0.26 printed on H200 GPUs: its failures, and two GPUs."""

from pathlib import Path

import pytest

from evalq.vllm_memory.engine_run import EngineRun
from evalq.vllm_memory.reader import read_logs

LOGS = Path(__file__).parent / "logs"


def one(name: str) -> EngineRun:
    (found,) = read_logs([str(LOGS / f"real-0.26-h200-{name}.log")])
    return found


@pytest.mark.parametrize(
    ("name", "category", "words", "advice"),
    [
        ("no-kv", "no_kv_memory", "No available memory for the cache blocks", "gpu_memory_utilization"),
        ("too-long", "max_len_too_large", "max seq len (10000000)", "max_model_len=1285040"),
        ("oom-load", "oom_load", "Tried to allocate 32.00 MiB", "evalq plan"),
        ("busy", "gpu_busy", "(54.89/139.8 GiB)", "gpu_memory_utilization=0.39"),
    ],
)
def test_the_cause_and_what_to_do(name: str, category: str, words: str, advice: str) -> None:
    run = one(name)
    assert run.status == "failed" and run.failure is not None
    assert run.failure.category == category and words in run.failure.message
    assert any(advice in line for line in run.recommendations)


def test_two_gpus_and_their_ranks() -> None:
    run = one("tp2")
    assert (run.status, run.engine.tensor_parallel, len(run.ranks)) == ("success", 2, 2)
    assert run.memory.kv_cache_gib == 27.82 and run.cache.tokens == 27_558_548
    assert any("29709753344" in line for line in run.recommendations)
