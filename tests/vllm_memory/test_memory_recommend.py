# ruff: noqa: E501
"""The KV cache to reserve: vLLM's own bytes, and the identity behind them."""

from pathlib import Path

import pytest

from evalq.vllm_memory.reader import read_logs
from evalq.vllm_memory.recommend import GIB, ROUNDING_GIB, kv_cache_memory_bytes

LOGS = Path(__file__).parent / "logs"

# KV cache and CUDA graphs in GiB as logged; bytes recommended within the request and for the whole H100; and
# requested and free memory in GiB.
MEASURED = [
    ("openai/gpt-oss-20b", 50.28, 0.39, 53414341735, 61267232256, 78.57),
    ("Llama-3.3-70B FP8, two GPUs", 32.0, -0.42, 34644505703, 41499086336, 77.65),
    ("meta-llama/Llama-3.1-8B-Instruct", 51.38, -0.45, 55491753575, 63344644096, 78.57),
    ("Qwen/Qwen3-0.6B", 64.45, 0.10, 68930180199, 76783070720, 78.57),
]


@pytest.mark.parametrize(("model", "kv_cache", "graphs", "bytes_requested", "bytes_whole", "free"), MEASURED)
def test_identity_holds_within_the_rounding_of_the_log(
    model: str, kv_cache: float, graphs: float, bytes_requested: int, bytes_whole: int, free: float
) -> None:
    mine = kv_cache_memory_bytes(kv_cache, graphs)
    assert abs(mine - bytes_requested) <= ROUNDING_GIB * GIB, model
    # Two more figures of two decimals: what was free at the start and what was requested.
    assert abs(bytes_whole - bytes_requested - (free - 71.26) * GIB) <= ROUNDING_GIB * GIB, model


def test_bytes_of_the_log_are_shown_as_they_are() -> None:
    found = {run.engine.model: run for run in read_logs([str(LOGS / "written-0.18-h100.log")])}
    assert found["openai/gpt-oss-20b"].recommendations == (
        "--kv-cache-memory=53414341735 (49.75 GiB) fits into the requested memory",
        "--kv-cache-memory=61267232256 (57.06 GiB) uses the whole GPU",
    )
    (two_gpus,) = [
        r for r in read_logs([str(LOGS / "written-0.18-h100.log")]) if r.engine.tensor_parallel == 2
    ]
    assert two_gpus.recommendations[0].startswith("--kv-cache-memory=34644505703 (32.27 GiB per GPU)")


def test_bytes_of_0_10_2_whose_message_ends_in_bytes() -> None:
    (found,) = read_logs([str(LOGS / "written-0.10.2-h100.log")])
    assert (found.cache.requested_bytes, found.cache.whole_gpu_bytes) == (55491753575, 63344644096)


def test_a_real_run_agrees_with_the_identity() -> None:
    for name in ("bf16", "int4"):
        (found,) = read_logs([str(LOGS / f"real-0.26-h200-{name}.log")])
        kv_cache, graphs = found.memory.kv_cache_gib, found.memory.cudagraph_gib
        assert kv_cache is not None and graphs == 0.0 and found.cache.requested_bytes is not None
        assert abs(kv_cache_memory_bytes(kv_cache, graphs) - found.cache.requested_bytes) <= 0.005 * GIB + 1


def test_computed_where_the_log_keeps_its_bytes_to_itself(tmp_path: Path) -> None:
    lines = (LOGS / "written-0.18-h100.log").read_text().split("\n")
    path = tmp_path / "info.log"
    path.write_text("\n".join(line for line in lines if " DEBUG " not in line))
    found = [run for run in read_logs([str(path)]) if run.status == "success"]
    assert [run.cache.requested_bytes for run in found] == [None] * 4
    for run, (_, kv_cache, graphs, *_) in zip(found, MEASURED, strict=True):
        (only,) = run.recommendations
        assert f"={kv_cache_memory_bytes(kv_cache, graphs)} " in only and "rounded to 0.01 GiB" in only


def test_nothing_to_recommend() -> None:
    # No --kv-cache-memory before 0.10.2, none on a CPU, and graphs whose size is not known.
    for name in (
        "written-0.9.2-tp2-colours",
        "written-0.8.5-v0-a100-lora",
        "real-0.32-cpu",
        "written-0.23-data-parallel",
    ):
        (found,) = read_logs([str(LOGS / f"{name}.log")])
        assert found.status == "success" and found.recommendations == (), name
