"""`compare.py --memory`: the table of a comparison's own records, predicted beside measured."""

import io
from typing import Any

import pytest
from conftest import Runs
from rich.console import Console

from evalq.results.record import Failure, ResultRecord
from evalq.vllm_memory.reader import runs_from_records
from evalq.vllm_memory.run_output import print_runs

MEMORY = {
    "weights_gib": 14.99,
    "peak_activation_gib": 4.76,
    "non_torch_gib": 0.13,
    "cuda_graphs_gib": 0.0,
    "kv_cache_gib": 51.38,
    "kv_cache_tokens": 420896.0,
    "requested_gib": 71.26,
    "device_total_gib": 79.18,
}
PREDICTED = {"verdict": "fits", "category": None, "memory": MEMORY | {"weights_gib": 15.01}}


def record(**more: Any) -> ResultRecord:
    values = {"metrics_version": 1, "label": "vLLM BF16", "group": "vLLM", "status": "ok", "engine": "vllm"}
    values |= {"protocol": "exllamav3", "comparison": {}, "identity": {}, "engine_version": "vllm 0.26.0"}
    return ResultRecord(**values | more)


def shown(*records: ResultRecord) -> str:
    console = Console(width=160, file=io.StringIO())
    print_runs(runs_from_records(records), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_measured_predicted_and_the_cache_to_reserve() -> None:
    text = shown(record(execution={"memory": MEMORY, "predicted": PREDICTED}))
    assert "vLLM BF16" in text and "14.99" in text and "420,896" in text
    assert "predicted: weights 15.01, peak activation 4.76" in text
    assert "vLLM 0.26.0" in text and "vllm 0.26.0" not in text
    assert f"--kv-cache-memory={int(51.38 * 2**30) - 150 * 2**20}" in text


def test_a_failed_model_has_its_category_and_remedy() -> None:
    error = Failure(category="no_kv_memory", message="No available memory", remedy="raise it")
    text = shown(record(status="failed", error=error))
    assert "no_kv_memory" in text and "→ raise it" in text


ODD = [None, "x", [], {}, True, float("nan"), float("inf"), 10**400, -1, "\x1b[31m"]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_stored_record_with_odd_values(value: Any) -> None:
    options = {"max_model_len": value, "tensor_parallel_size": value, "gpu_memory_utilization": value}
    sections = [dict.fromkeys(MEMORY, value), value]
    for memory in sections:
        execution = {"memory": memory, "options": options, "predicted": {"memory": memory}}
        said = "vLLM BF16" if memory else "no engine said where its memory went"
        assert said in shown(record(execution=execution), record())
    error = Failure(category="of_another_version", message="why", remedy="what to do")
    assert "of_another_version: failed" in shown(record(status="failed", error=error))


def test_the_flag_prints_the_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"options": {"misbehave": "oom-load"}}, {})
    code, _ = runs.compare(runs.data(), models, more=("--memory",))
    assert code == 1
    assert "GPU memory in GiB" in capsys.readouterr().err
