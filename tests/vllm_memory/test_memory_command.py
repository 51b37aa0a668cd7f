# ruff: noqa: E501
"""`evalq memory`: text, Markdown, CSV, JSON, standard input, exit codes; and runs from records."""

import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from evalq.cli import memory as command
from evalq.errors import SpecError
from evalq.results.record import Failure, ResultRecord
from evalq.vllm_memory.engine_run import MemoryBreakdown
from evalq.vllm_memory.reader import read_logs, runs_from_records
from evalq.vllm_memory.run_output import as_csv, as_json, markdown, print_runs

LOGS = Path(__file__).parent / "logs"
H100 = str(LOGS / "written-0.18-h100.log")
H200 = str(LOGS / "real-0.26-h200-bf16.log")
KEYS = (
    "model status category weights_gib peak_activation_gib non_torch_gib cudagraph_gib kv_cache_gib "
    "kv_cache_tokens tensor_parallel max_model_len load_seconds gpu_total_gib utilization recommendations"
).split()


def memory(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_json_is_a_list_of_runs_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(H100, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 6 and all(list(run)[: len(KEYS)] == KEYS for run in found)
    failed, worked = found[0], found[1]
    assert (failed["status"], failed["category"], failed["gpu_total_gib"]) == ("failed", "oom_load", 79.18)
    assert failed["failure"]["tried_gib"] == 3.5 and failed["weights_gib"] is None
    assert (worked["weights_gib"], worked["kv_cache_tokens"], worked["utilization"]) == (13.47, 1098432, 0.9)
    assert worked["kv_cache_memory_requested_bytes"] == 53414341735 and len(worked["recommendations"]) == 2
    assert [len(run["ranks"]) for run in found] == [0, 1, 2, 1, 1, 1]


def test_a_cpu_has_no_gpu_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(str(LOGS / "real-0.32-cpu.log"), "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["device"], found["gpu_total_gib"], found["node_total_gib"]) == ("cpu", None, 11.21)


def test_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(H200, "--csv") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["model"], row["weights_gib"], row["cudagraph_gib"]) == ("/models/pad", "0.36", "0.0")
    assert row["recommendations"].count("--kv-cache-memory=") == 2 and row["error"] == ""


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(H100, "--markdown") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | status | weights |") and lines[1].count("|") == lines[0].count("|")
    assert (
        "| openai/gpt-oss-20b | success | 13.47 | 7.38 | 0.13 | 0.39 | 50.28 | 1 | 16,000 | 31.68 | 1,098,432 |"
        in lines
    )
    assert any(
        line.startswith("- deepseek-ai/DeepSeek-R1, oom_load: ") and "free 3.33" in line for line in lines
    )


def test_markdown_escapes_what_would_break_the_table(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    path.write_text(Path(H200).read_text().replace("/models/pad", "a|b[red]c"))
    runs = read_logs([str(path)])
    assert "| a\\|b\\[red\\]c |" in markdown(runs)
    console = Console(width=130, record=True, file=io.StringIO())
    print_runs(runs, console)
    assert "a|b[red]c" in console.export_text()


def test_text_shows_summary_details_and_failures_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(H100) == 1
    text = capsys.readouterr().out
    for expected in (
        "13.47  7.38   0.13    0.39  50.28",
        "GPU of 79.18 GiB, 78.57 free at the start; requested 0.9 = 71.26",
        "weights 33.88, peak activation 4.84, non-torch 0.55, KV cache 32.00, CUDA graphs -0.42",
        "Worker_TP1 pid=951: weights 33.88",
        "→ --kv-cache-memory=53414341735 (49.75 GiB) fits into the requested memory",
        "oom_load: out of memory while loading",
        "tried to allocate 3.50 GiB, free 3.33 GiB, in use 75.84 GiB, of which PyTorch 75.16 GiB",
        "no_kv_memory: no memory left for the KV cache",
    ):
        assert expected in text, expected
    assert text.index("oom_load: out of memory") > text.index("Qwen/Qwen3-0.6B  ")


def on_terminal(width: int, *names: str) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    print_runs(read_logs(names), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 100, 130, 200])
def test_every_name_and_figure_is_whole_in_any_width(width: int) -> None:
    text = on_terminal(width, H100, H200)
    table = text.partition("\n\n")[0].splitlines()
    assert max(map(len, table[:-1])) <= width, "only the line about what was left out may be longer"
    assert "…" not in "".join(table)
    names = ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "openai/gpt-oss-20b", "Qwen/Qwen3-0.6B")
    for whole in (*names, "no_kv_memory", "13.47", "50.28", "-1.44"):
        assert any(whole in line.split() for line in table), whole
    if width == 60:
        assert table[-1].startswith("no room for: TP, max len, load s, KV tokens")
    assert "KV cache of 2,414,128 tokens" in text and "tensor parallel 2" in text


def test_a_pipe_gets_every_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert memory(H100) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "RedHatAI" in line)
    assert line.split()[1:] == "success 33.88 4.84 0.55 -0.42 32.00 2 16,000 116.61 209,712".split()


def test_escapes_of_a_terminal_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    hostile = "a\x1b]0;title\x07b\u202ec"
    text = Path(H100).read_text().replace("openai/gpt-oss-20b", hostile)
    path.write_text(text.replace("OutOfMemoryError: ", "OutOfMemoryError: \x1b]0;title\x07"))
    runs = read_logs([str(path)])
    for shown in (on_terminal(80, str(path)), markdown(runs), as_csv(runs), as_json(runs)):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
        assert "0;title" in shown
    assert json.loads(as_json(runs))[1]["model"] == hostile


def test_a_command_to_copy_quotes_the_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    path.write_text(Path(H100).read_text().replace("deepseek-ai/DeepSeek-R1", "a;$(id)"))
    assert read_logs([str(path)])[0].recommendations[0].startswith("evalq plan 'a;$(id)' --gpu-memory 79.18")


def test_a_cell_of_csv_is_no_formula(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    path.write_text(Path(H200).read_text().replace("/models/pad", "=HYPERLINK(1)"))
    (row,) = csv.DictReader(io.StringIO(as_csv(read_logs([str(path)]))))
    assert row["model"] == "'=HYPERLINK(1)"


def test_standard_input_and_several_logs() -> None:
    code = "import sys; from test_memory_command import memory; sys.exit(memory('-', sys.argv[1], '--json'))"
    done = subprocess.run(
        [sys.executable, "-c", code, H200],
        input=Path(H100).read_bytes(),
        capture_output=True,
        cwd=Path(__file__).parent,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1 and len(found) == 7, done.stderr
    assert [run["file"] for run in found] == ["standard input"] * 6 + [H200]


def test_empty_standard_input() -> None:
    code = "from evalq.vllm_memory.reader import read_logs; read_logs(['-'])"
    done = subprocess.run([sys.executable, "-c", code], input=b"", capture_output=True, text=False)
    assert b"SpecError: standard input: empty" in done.stderr


def test_one_picture_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(H200, "--plot-file", str(tmp_path / "m.svg"), "--title", "mine") == 0
    assert "mine" in (tmp_path / "m.svg").read_text() and "chart: " in capsys.readouterr().err
    assert memory(H100, "--plot", "--dark") == 1
    assert (Path("plots") / "out" / "memory-dark.png").stat().st_size > 10_000
    with pytest.raises(SpecError, match='cannot be written as ".gif"'):
        memory(H200, "-o", "m.gif")
    with pytest.raises(SpecError, match="nothing to draw"):
        memory(str(LOGS / "real-0.32-cpu.log"), "--plot")


def test_reading_logs_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, argparse; from evalq.cli import memory as command; assert 'rich' not in sys.modules; "
        "p = argparse.ArgumentParser(); command.add_arguments(p); command.run(p.parse_args(sys.argv[1:])); "
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, H200, "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr


def record(label: str, **more: object) -> ResultRecord:
    values = {
        "metrics_version": 1, "label": label, "group": label, "status": "ok", "engine": "vllm",
        "engine_version": "0.26.0", "protocol": "exllamav3", "comparison": {}, "identity": {}, "load_seconds": 28.45,
    }  # fmt: skip
    return ResultRecord.model_validate(values | more)


def test_runs_from_records() -> None:
    memory_facts = {
        "weights_gib": 0.36, "peak_activation_gib": 0.24, "non_torch_gib": 0.22, "cuda_graphs_gib": 0.0,
        "kv_cache_gib": 69.07, "kv_cache_tokens": 2414128.0, "requested_gib": 69.9, "device_total_gib": 139.8,
    }  # fmt: skip
    options = {"gpu_memory_utilization": 0.5, "max_model_len": 2064, "tensor_parallel_size": 1}
    error = Failure(category="no_kv_memory", message="No available memory", remedy="use more GPUs")
    found = runs_from_records(
        [
            record("vLLM BF16", execution={"memory": memory_facts, "options": options}),
            record("hf BF16"),
            record("vLLM 70B", status="failed", error=error),
        ]
    )
    assert [run.engine.model for run in found] == ["vLLM BF16", "vLLM 70B"]
    worked, failed = found
    assert worked.memory == MemoryBreakdown(0.36, 0.24, 0.22, 0.0, 69.07) and worked.cache.tokens == 2_414_128
    assert (worked.device.total_gib, worked.engine.max_model_len, worked.seconds.load) == (139.8, 2064, 28.45)
    assert "--kv-cache-memory=" in worked.recommendations[0]
    assert failed.category == "no_kv_memory" and failed.recommendations == ("use more GPUs",)
    console = Console(width=130, record=True, file=io.StringIO())
    print_runs(found, console)
    assert "2,414,128" in console.export_text()
