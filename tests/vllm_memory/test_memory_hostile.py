"""Logs that no engine wrote: long lines, numbers that are none, too much of everything.

The seconds of each test are the bound of a hang; what is read here takes a few milliseconds.
"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from evalq.engine.failures import classify
from evalq.errors import SpecError
from evalq.vllm_memory import log
from evalq.vllm_memory.engine_run import EngineRun
from evalq.vllm_memory.log import parse_line
from evalq.vllm_memory.reader import read_logs
from evalq.vllm_memory.run_output import as_csv, as_json, markdown, print_runs

LOGS = Path(__file__).parent / "logs"
START = "Initializing a V1 LLM engine (v0.26.0) with config: model='m', max_seq_len=512\n"
LONG = 200_000


def read(tmp_path: Path, text: str) -> list[EngineRun]:
    """The runs of a log, after they were written in every form."""
    path = tmp_path / "vllm.log"
    path.write_text(text)
    runs = read_logs([str(path)])
    print_runs(runs, Console(file=io.StringIO(), width=80, force_terminal=True))
    markdown(runs)
    as_csv(runs)
    json.loads(as_json(runs))
    return runs


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "repeated",
    [
        "Worker died ",
        "Failed core proc ",
        "(",
        "( pid=1 ",
        "(pid=1) ",
        "(a pid=1",
        "pid=",
        "1 | ",
        "2025-01-01T0 ",
        "\x1b[0",
        "INFO 11-21 02:38:58 [a:1:",
        "ValueError: (",
        "a.",
        "ValueError: Failed to load model (original error: ",
        "OutOfMemoryError: Tried to allocate 1",
        "OutOfMemoryError: has 1",
        "ValueError: Free memory on device ",
        "ValueError: requires the ",
        "Initializing a V1 LLM engine (v",
        "args: Namespace(model='",
        "non-default args: {'model': \"",
        "`--kv-cache-memory=1` ",
        "Model loading took 1",
        "# cuda blocks: 1",
        "# a",
        "Free memory on device (1/",
        "1",
        "\r",
        "\n",
        " \n",
        "Killed ",
        "[rank0]: ",
    ],
)
def test_the_time_grows_with_the_length(tmp_path: Path, repeated: str) -> None:
    long = repeated * (LONG // len(repeated))
    for text in (START + long, START + "RuntimeError: " + long, START + long + "\nKeyError: 'x'"):
        assert read(tmp_path, text)


@pytest.mark.timeout(20)
def test_an_error_text_is_sorted_in_time() -> None:
    for start in ("requires the ", "Free memory on device ", "Available memory on node "):
        assert classify(start * (LONG // len(start)), "load") == "engine_error"


NO_NUMBERS = ["1.2.3", "9" * 400, "9" * 5000, "1e999", "nan", "inf", "-", "\u0661\u0662", "", "."]


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize(
    "line",
    [
        "Model loading took {} GiB and {} seconds",
        "Available KV cache memory: {} GiB",
        "GPU KV cache size: {} tokens",
        "Using max model len {}",
        "# cuda blocks: {}, # CPU blocks: {}",
        "torch.OutOfMemoryError: Tried to allocate {} GiB. GPU 0 has a total capacity of {} GiB",
        "torch.OutOfMemoryError: of which {} MiB is free. Process 1 has {} GiB memory in use.",
        "ValueError: ({} GiB KV cache is needed, which is larger than the available KV cache memory ({} GiB",
        "ValueError: To serve at least one request; the estimated maximum model length is {}",
        "Worker died, exit code: -{}",
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_no_figure(tmp_path: Path, line: str, number: str) -> None:
    (found,) = read(tmp_path, START + line.format(number, number))
    assert found.memory.weights_gib is None and found.cache.tokens is None
    if found.failure is not None:
        assert found.failure.tried_gib is None and found.failure.longest is None


@pytest.mark.parametrize("number", NO_NUMBERS)
def test_arguments_that_are_no_number(tmp_path: Path, number: str) -> None:
    given = f"non-default args: {{'gpu_memory_utilization': {number}, 'tensor_parallel_size': {number}}}\n"
    (found,) = read(tmp_path, given + START)
    assert found.engine.tensor_parallel is None and found.device.utilization is None
    assert found.engine.model == "m"


def test_numbers_of_every_form_that_vllm_prints(tmp_path: Path) -> None:
    (found,) = read(
        tmp_path,
        f"{START}Model loading took 14.99 GiB and 9.166687 seconds\nAvailable KV cache memory: -1.44 GiB\n"
        "GPU KV cache size: 1,098,432 tokens\nMaximum concurrency for 16,000 tokens per request: 68.65x\n",
    )
    assert (found.memory.weights_gib, found.memory.kv_cache_gib) == (14.99, -1.44)
    assert (found.cache.tokens, found.cache.sequences, found.seconds.load) == (1_098_432, 68.65, 9.166687)


def test_a_long_line_is_read_as_far_as_the_limit() -> None:
    line = parse_line(1, "INFO 11-21 02:38:58 [a.py:1] " + "x" * LONG)
    assert set(line.message) == {"x"} and len(line.message) < log.LINE_CHARACTERS_MAX


def test_too_much_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LINES_MAX", 1000)
    monkeypatch.setattr(log, "BYTES_MAX", 100_000)
    assert read(tmp_path, START + "x\n" * 900)
    for text, words in ((START + "x\n" * 1000, "more than 1,000 lines"), ("x" * 100_001, "more than 0 MiB")):
        with pytest.raises(SpecError, match=words) as found:
            read(tmp_path, text)
        assert "grep -v POST" in str(found.value) and "\n" not in str(found.value)


def test_endless_files_end() -> None:
    with pytest.raises(SpecError, match="/dev/zero: a binary file, not a log"):
        read_logs(["/dev/zero"])


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nouser/vllm.log", "\ud800", ""])
def test_names_that_are_no_file(name: str) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_logs([name])
