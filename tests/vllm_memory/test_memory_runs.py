# ruff: noqa: E501
"""Real logs and logs of the documented formats become runs with the right figures."""

import re
from pathlib import Path

import pytest

from evalq.errors import SpecError
from evalq.vllm_memory.engine_run import EngineRun, MemoryBreakdown
from evalq.vllm_memory.log import parse_line
from evalq.vllm_memory.reader import read_logs

LOGS = Path(__file__).parent / "logs"


def runs(name: str) -> list[EngineRun]:
    return read_logs([str(LOGS / f"{name}.log")])


def run(name: str) -> EngineRun:
    (only,) = runs(name)
    return only


H100 = [
    ("deepseek-ai/DeepSeek-R1", "oom_load", MemoryBreakdown(), 1, None),
    ("openai/gpt-oss-20b", None, MemoryBreakdown(13.47, 7.38, 0.13, 0.39, 50.28), 1, 31.68),
    (
        "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic",
        None,
        MemoryBreakdown(33.88, 4.84, 0.55, -0.42, 32.0),
        2,
        116.61,
    ),
    (
        "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic",
        "no_kv_memory",
        MemoryBreakdown(67.72, 4.84, 0.14, 0.6, -1.44),
        1,
        45.09,
    ),
    ("meta-llama/Llama-3.1-8B-Instruct", None, MemoryBreakdown(14.99, 4.76, 0.13, -0.45, 51.38), 1, 31.46),
    ("Qwen/Qwen3-0.6B", None, MemoryBreakdown(1.12, 5.56, 0.13, 0.1, 64.45), 1, 16.54),
]


def test_every_row_of_the_h100_table() -> None:
    found = runs("written-0.18-h100")
    rows = [(r.engine.model, r.category, r.memory, r.engine.tensor_parallel, r.seconds.load) for r in found]
    assert rows == H100
    for one in found:
        assert one.engine.max_model_len == 16000 and one.engine.version == "0.18.0"
        assert one.device.total_gib == 79.18
        if one.status == "success":
            assert one.device.requested_gib == 71.26 and one.device.utilization == 0.9


# vLLM's own words on a GPU, V2 model runner.
@pytest.mark.parametrize(
    ("name", "memory", "tokens"),
    [
        ("real-0.26-h200-bf16", MemoryBreakdown(0.36, 0.24, 0.22, 0.0, 69.07), 2_414_128),
        ("real-0.26-h200-int4", MemoryBreakdown(0.15, 0.21, 0.22, 0.0, 69.32), 2_422_864),
    ],
)
def test_h200(name: str, memory: MemoryBreakdown, tokens: int) -> None:
    found = run(name)
    assert (found.status, found.memory, found.cache.tokens) == ("success", memory, tokens)
    assert (found.device.total_gib, found.device.free_gib, found.device.utilization) == (139.8, 139.29, 0.5)
    assert found.engine.eager and found.engine.max_model_len == 2064 and found.device.kind == "cuda"


@pytest.mark.parametrize(
    ("name", "version", "kv_cache_gib", "tokens", "node_gib"),
    [
        ("real-0.28-cpu", "0.28.0", 1.0, 46_592, 15.71),
        ("real-0.30-cpu", "0.30.0", 1.0, 46_592, 15.71),
        ("real-0.32-cpu", "0.32.0", 2.0, 89_929, 11.21),
        ("real-0.32-cpu-auto", "0.32.0", 3.88, 180_608, 15.84),
        ("real-0.32-cpu-tp3", "0.32.0", 0.1, 13_568, 19.34),
    ],
)
def test_cpu(name: str, version: str, kv_cache_gib: float, tokens: int, node_gib: float) -> None:
    found = run(name)
    assert (found.status, found.engine.version, found.device.kind) == ("success", version, "cpu")
    assert (found.memory.kv_cache_gib, found.cache.tokens) == (kv_cache_gib, tokens)
    assert found.device.total_gib == node_gib
    assert found.memory.weights_gib is None, "vLLM on a CPU does not say"
    assert found.seconds.load is not None, "taken from reading the weights"


def test_interleaved_ranks_of_a_real_run() -> None:
    found = run("real-0.32-cpu-tp3")
    assert [rank.process.split()[0] for rank in found.ranks] == ["Worker_TP0", "Worker_TP1", "Worker_TP2"]
    assert {rank.memory.kv_cache_gib for rank in found.ranks} == {0.1}


def test_ranks_with_colours_give_the_most_and_for_the_cache_the_least() -> None:
    found = run("written-0.9.2-tp2-colours")
    assert found.memory == MemoryBreakdown(13.9281, None, None, 1.31, 19.41)
    assert (found.seconds.load, found.cache.tokens, found.cache.sequences) == (7.014522, 211_984, 51.75)
    assert [(r.process, r.memory.kv_cache_gib) for r in found.ranks] == [
        ("VllmWorker rank=0 pid=300", 19.62),
        ("VllmWorker rank=1 pid=301", 19.41),
    ]


def test_v0_counts_blocks() -> None:
    found = run("written-0.8.5-v0-a100-lora")
    assert found.engine.generation == "V0" and found.cache.tokens == 1_013_184
    assert found.memory == MemoryBreakdown(0.2415, 0.46, 0.05, 0.16, 34.79)
    assert (found.seconds.load, found.seconds.compile, found.seconds.graph_capture) == (3.8, 9.34, 14)
    assert (found.device.total_gib, found.device.requested_gib) == (39.49, 35.54)


def test_gb_of_early_versions_are_gib() -> None:
    found = run("written-0.8.1-gb")
    assert (found.memory.weights_gib, found.seconds.load) == (14.9888, 28.719376)
    assert found.status == "success" and found.memory.kv_cache_gib is None


def test_consumed_memory_is_split_and_the_graphs_are_not_counted_twice() -> None:
    found = run("written-0.29-consumed")
    assert found.memory == MemoryBreakdown(15.27, 2.31, 0.32, 0.47, 54.43)
    # What was requested is shared out among weights, non-torch, activation, cache and the graphs' estimate.
    assert 15.27 + 0.32 + 2.31 + 54.43 + 0.52 == pytest.approx(found.device.requested_gib, abs=0.01)


def test_engines_of_one_data_parallel_start_are_one_run() -> None:
    found = run("written-0.23-data-parallel")
    assert (found.engine.data_parallel, found.cache.tokens, len(found.ranks)) == (2, 169_360, 2)


def test_several_runs_of_several_files_keep_their_places() -> None:
    names = [str(LOGS / "written-0.18-h100.log"), str(LOGS / "real-0.26-h200-bf16.log")]
    found = read_logs(names)
    assert len(found) == 7 and found[-1].engine.model == "/models/pad"
    assert [r.source for r in found] == [names[0]] * 6 + [names[1]]
    text = Path(names[0]).read_bytes().decode().split("\n")
    assert all("non-default args" in text[r.line - 1] for r in found[:6])


def test_a_log_that_ends_before_the_engine_is_ready(tmp_path: Path) -> None:
    lines = (LOGS / "real-0.26-h200-bf16.log").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if "Model loading took" in line)
    path = tmp_path / "cut.log"
    path.write_text("".join(lines[: end + 1]))
    (found,) = read_logs([str(path)])
    assert (found.status, found.memory.weights_gib, found.failure) == ("incomplete", 0.36, None)


def test_the_same_log_from_powershell(tmp_path: Path) -> None:
    text = (LOGS / "real-0.26-h200-bf16.log").read_text()
    path = tmp_path / "utf16.log"
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    assert read_logs([str(path)])[0].memory == run("real-0.26-h200-bf16").memory


@pytest.mark.parametrize(
    ("text", "process", "message"),
    [
        ("INFO 11-21 02:38:58 [model_runner.py:305] took 1 GiB", "", "took 1 GiB"),
        ("INFO 06-15 12:17:57 model_runner.py:160] took 1 GB", "", "took 1 GB"),
        ("(Worker_TP1 pid=7) ERROR 11-21 02:38:58 [a.py:1] ValueError: x", "Worker_TP1 pid=7", "ValueError: x"),
        ("(VllmWorker rank=1 pid=12) DEBUG 11-21 02:38:58 [v1/a.py:1] x", "VllmWorker rank=1 pid=12", "x"),
        ("(EngineCore_DP0 pid=1) (RayWorkerWrapper pid=2, ip=10.0.0.1) x", "RayWorkerWrapper pid=2, ip=10.0.0.1", "x"),
        ("\x1b[1;36m(Worker pid=3)\x1b[0;0m \x1b[32mINFO\x1b[0m 11-21 02:38:58 [a.py:1] x", "Worker pid=3", "x"),
        ("vllm-1  | (APIServer pid=1) INFO 11-21 02:38:58 [a.py:1] x", "APIServer pid=1", "x"),
        ("2026-11-21T02:38:58.123Z INFO 11-21 02:38:58 [a.py:1] x", "", "x"),
        ("[rank0]: torch.OutOfMemoryError: x", "[rank0]", "torch.OutOfMemoryError: x"),
        ("(no process) here", "", "(no process) here"),
    ],
)  # fmt: skip
def test_what_stands_before_a_message(text: str, process: str, message: str) -> None:
    line = parse_line(1, text)
    assert (line.process, line.message) == (process, message)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\x7fELF\x00\x01\x02", "a binary file"),
        (b"INFO 11-21 02:38:58 [a.py:1] hello\n", "no engine starts in this log"),
    ],
)
def test_no_log(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(data)
    with pytest.raises(SpecError, match=said) as caught:
        read_logs([str(path)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_log() -> None:
    with pytest.raises(SpecError, match="no-such.log: cannot be read: No such file"):
        read_logs(["no-such.log"])


def test_no_log_names_a_machine() -> None:
    for path in LOGS.glob("*.log"):
        text = path.read_text()
        assert text.startswith(("# Printed by vLLM", "# Written from the documented format of vLLM")), path
        assert not re.search(r"/(root|home|tmp|work)/", text), path
