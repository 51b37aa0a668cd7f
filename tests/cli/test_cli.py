"""The command line: flags, exit codes, and one clear line for everything a user can get wrong."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Runs

from evalq.cli.main import COMMANDS, compare_main, main


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def fails(runs: Runs, capsys: pytest.CaptureFixture[str], data: Path, models: Path, *more: str) -> str:
    assert compare_main(["-d", str(data), "-m", str(models), *more]) == 2
    return one_line(capsys)


def test_missing_spec_lists_the_shipped_ones(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(runs, capsys, Path("nowhere.json"), runs.models({}))
    assert "nowhere.json: no such file" in line and "wiki2.json" in line


def test_shipped_spec_is_found_by_name(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny checkpoint has no tokenizer, which is what the shipped spec then fails on."""
    line = fails(runs, capsys, Path("sample.json"), runs.models({}), "-q")
    assert "no usable tokenizer" in line and "tokenizer_dir" in line


def test_broken_json_names_line_and_column(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    broken = runs.write("broken.json", '{\n  "dataset": "sample",\n  "eval_len" 12\n}')
    assert "broken.json: line 3 column 14: not valid JSON" in fails(runs, capsys, broken, runs.models({}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_len": "2048"}, 'data.json.eval_len: input should be a valid integer, not "2048"'),
        ({"eval_lenn": 5}, 'data.json.eval_lenn: unknown key (did you mean "eval_len"?)'),
        ({"dataset": "wiki3"}, 'dataset: no such text; did you mean "wiki2"? known: wiki2, wikitext-103'),
        ({"protocol": "exllama3"}, 'did you mean "exllamav3"'),
        ({"eval_len": 1}, "eval_len: input should be greater than or equal to 2"),
        ({"eval_len": 10**6, "eval_stride": 10**6}, "shorter than a window"),
        ({"dataset": "text"}, 'needs "path"'),
        ({"dataset": "text", "path": "none.txt"}, "cannot read the text"),
        ({"dataset": "wiki2", "path": "data.json"}, "not the WikiText-2 raw test split"),
        ({"tokenize_fn": "nope"}, 'unknown backend "nope"'),
        ({"protocol": "lm-eval", "eval_stride": None, "bos": "never"}, "bos"),
        ({"protocol": "qbench", "max_rows": 10**6}, "max_rows"),
    ],
)
def test_bad_data_spec(
    runs: Runs, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    compare_main(
        ["-d", str(runs.data()), "-m", str(runs.models({})), "-q"]
    )  # tokenizing is not what is tested
    capsys.readouterr()
    assert expected in fails(runs, capsys, runs.data(**changes), runs.models({}), "-q")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"load_fn": "exlama"}, 'models[0].load_fn: unknown backend "exlama"'),
        ({"fwd_fn": "nothing"}, "models[0].fwd_fn: unknown backend"),
        ({"labell": "x"}, 'models[0].labell: unknown key (did you mean "label"?)'),
        ({"model_dir": 5}, "models[0].model_dir: input should be a valid string"),
        ({"model_dir": ["a"]}, "model_dir as a list holds two paths"),
        ({"options": {"sed": 1}}, 'models[0].options.sed: unknown option (did you mean "seed"?)'),
        ({"options": {"seed": "1"}}, 'options.seed: should be int, not "1"'),
        ({"options": {"seed": True}}, "options.seed: should be int, not true"),
        ({"options": {"mode": "cold"}}, 'options.mode: "cold" is not one of'),
        ({"python": "no/python"}, "no/python does not exist"),
    ],
)
def test_bad_model_spec(
    runs: Runs, capsys: pytest.CaptureFixture[str], model: dict[str, Any], expected: str
) -> None:
    line = fails(runs, capsys, runs.data(), runs.models(model), "-q")
    assert expected in line and "models.json" in line


def test_unknown_backend_lists_the_known_ones(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(runs, capsys, runs.data(), runs.models({"load_fn": "zzz"}))
    assert "fake" in line and "gguf" in line and "transformers" in line


def test_duplicate_labels(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(runs, capsys, runs.data(), runs.models({"label": "A b [red]"}, {"label": "A b [blue]"}))
    assert '"A b" is also the label of' in line and "models[0]" in line and "models[1]" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds no model"),
        ("[3]", "models[0]: a model is a JSON object"),
        ('"x"', "a model is a JSON object"),
    ],
)
def test_model_file_of_another_shape(
    runs: Runs, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    assert expected in fails(runs, capsys, runs.data(), runs.write("m.json", content))


def test_missing_model_is_a_failed_record_and_the_others_go_on(runs: Runs) -> None:
    code, (missing, scored) = runs.compare(runs.data(), runs.models({"model_dir": "/none/such"}, {}))
    assert code == 1
    assert missing["error"]["category"] == "model_missing" and "/none/such" in missing["error"]["message"]
    assert scored["status"] == "ok"


def test_empty_directory_holds_no_model(runs: Runs) -> None:
    (runs.folder / "empty").mkdir()
    code, (missing, _) = runs.compare(runs.data(), runs.models({"model_dir": "empty"}, {}))
    assert code == 1 and missing["error"]["category"] == "model_missing"


def test_no_model_at_all_to_take_the_tokenizer_from(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(runs, capsys, runs.data(), runs.models({"model_dir": "/none/such"}), "-q")
    assert "no tokenizer" in line and "/none/such" in line


def test_hub_name_without_a_network(runs: Runs) -> None:
    code, (failed, _) = runs.compare(
        runs.data(), runs.models({"model_dir": "nobody/nothing"}, {}), more=("--offline",)
    )
    assert code == 1 and failed["error"]["category"] == "model_missing"
    assert "hub is out of reach" in failed["error"]["message"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_only_checkpoint_is_refused_with_the_way_out(runs: Runs, name: str) -> None:
    folder = runs.folder / "pickled"
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x04.")
    code, (failed, _) = runs.compare(runs.data(), runs.models({"model_dir": str(folder)}, {}))
    assert code == 1 and failed["error"]["category"] == "unsafe_checkpoint"
    assert "safetensors" in failed["error"]["remedy"]


@pytest.mark.parametrize("keep", [4, 60, 300])
def test_truncated_safetensors(runs: Runs, keep: int) -> None:
    file = runs.tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    code, records = runs.compare(runs.data(), runs.models({}, {"model_dir": str(_other(runs))}))
    assert code == 1 and records[0]["error"]["category"] == "model_corrupt"
    assert "model.safetensors" in records[0]["error"]["message"]


def _other(runs: Runs) -> Path:
    from checkpoints import make_tiny

    return make_tiny(runs.folder / "other")


def test_not_comparable_options_are_refused_before_work(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown kind of picture" in fails(runs, capsys, runs.data(), runs.models({}), "-o", "chart.bmp")
    runs.write("file", "")
    line = fails(runs, capsys, runs.data(), runs.models({}), "--csv", "file/x.csv")
    assert "cannot make its folder" in line
    assert "only one of" in fails(runs, capsys, runs.data(), runs.models({}), "--json", "-", "--csv", "-")


@pytest.mark.parametrize(
    "arguments", [[], ["-d", "x"], ["-d", "x", "-m", "y", "--max-rows", "0"], ["--nonsense"]]
)
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err.lower()


def test_mask_and_wildcards(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.models({"label": "A one"}, {"label": "B two"}, name="m-1.json")
    runs.models({"label": "C three", "options": {"seed": 2}}, name="m-2.json")
    code, records = runs.compare(runs.data(), Path("m-*.json"), more=("-mask", "one; THREE"))
    assert code == 0 and [r["label"] for r in records] == ["A one", "C three"]
    capsys.readouterr()
    line = fails(runs, capsys, runs.data(), Path("m-*.json"), "-mask", "zzz")
    assert "matches no label" in line and "B two" in line


def test_outputs(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "A | b [red]"}, {"label": "C bad", "options": {"misbehave": "kill"}})
    code = compare_main(
        ["-d", str(runs.data()), "-m", str(models), "--json", "-", "--csv", "t.csv", "--markdown", "t.md"]
    )
    out = capsys.readouterr().out
    assert code == 1
    records = json.loads(out)
    wanted = {
        "label",
        "layer_bpw",
        "head_bpw",
        "vram_gb",
        "ppl",
        "status",
        "error",
        "tokens_scored",
        "ppl_stderr",
    }
    wanted |= {"tokens_per_second", "load_seconds", "protocol", "identity"}
    assert wanted <= records[0].keys()
    assert records[0]["label"] == "A | b" and records[0]["color"] == "red"
    assert set(records[1]["error"]) == {"category", "message", "remedy"}
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["A | b", "C bad"]
    assert float(rows[0]["ppl"]) == records[0]["ppl"] and rows[1]["ppl"] == ""
    table = Path("t.md").read_text()
    assert "A \\| b" in table and "failed: host_oom_or_killed" in table and "PPL per token" in table


def test_plot_is_written_and_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "A b"}, {"label": "C bad", "options": {"misbehave": "kill"}})
    assert runs.compare(runs.data(), models, more=("-p", "-t", "A title", "-dark", "-v"))[0] == 1
    err = capsys.readouterr().err
    (chart,) = (runs.folder / "plots" / "out").iterdir()
    assert f"chart: {chart.relative_to(runs.folder)}" in err
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert runs.compare(runs.data(), models, more=("-o", "c.svg", "-t", "A title"))[0] == 1
    svg = Path("c.svg").read_text()
    assert "A title" in svg and "C bad" in svg


def test_protocol_override(runs: Runs) -> None:
    _, (record,) = runs.compare(
        runs.data(), runs.models({}), more=("--protocol", "llama.cpp", "--max-rows", "2")
    )
    assert record["protocol"] == "llama.cpp"
    assert record["tokens_scored"] == 2 * 127 and record["comparison"]["eval_stride"] == 256


def test_quiet_prints_only_failures(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_main(["-d", str(runs.data()), "-m", str(runs.models({})), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    bad = runs.models({"options": {"misbehave": "kill"}})
    assert compare_main(["-d", str(runs.data()), "-m", str(bad), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Fake 0" in err and "SIGKILL" in err


def test_results_lists_scored_unfinished_and_failed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results"]) == 0
    assert "holds no results yet" in capsys.readouterr().out
    killed = {"label": "Half way", "options": {"misbehave": "kill", "misbehave_after": 4}}
    runs.compare(runs.data(), runs.models({"label": "Whole one"}, killed))
    capsys.readouterr()
    assert main(["results"]) == 0
    out = capsys.readouterr().out
    assert "Whole one" in out and "Half way" in out and "4/6 windows" in out and "host_oom_or_killed" in out
    assert main(["results", "--json"]) == 0
    assert [r["label"] for r in json.loads(capsys.readouterr().out)] == ["Whole one"]


def test_results_never_mixes_what_cannot_be_compared(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.compare(runs.data(), runs.models({"label": "One"}))
    runs.compare(runs.data(eval_len=128), runs.models({"label": "Two"}))
    capsys.readouterr()
    main(["results"])
    out = capsys.readouterr().out
    assert out.count("PPL/token") == 2 and "windows of 256" in out and "windows of 128" in out


def test_backends_lists_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "-v"]) == 0
    out = capsys.readouterr().out
    for word in (
        "hf",
        "gguf",
        "fake",
        "llamacpp",
        "transformers_auto_bf16",
        "llama-cpp-python",
        "batch_windows",
    ):
        assert word in out


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ram_gib"] > 0 and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"gpus", "driver", "cuda", "cpu", "evalq", "engines"} <= found.keys()
    assert main(["env"]) == 0
    assert found["cpu"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["compare.py", "--help"], ["-m", "evalq", "--help"], ["-m", "evalq", "compare", "--help"]]
)
def test_help_teaches_and_imports_no_library_for_it(command: list[str]) -> None:
    command = [str(ROOT / "compare.py"), "--help"] if command[0] == "compare.py" else command
    # -X importtime names every module as it is imported, on standard error.
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "evalq" in imported
    assert {"numpy", "pydantic", "safetensors", "torch", "matplotlib", "transformers"}.isdisjoint(imported)
    assert "compare" in run.stdout
    if "evalq" not in command or "compare" in command:
        assert "examples:" in run.stdout and "exit code" in run.stdout


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_teaches(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in out and f"evalq {command}" in out
    assert "%(" not in out and max(map(len, out.splitlines())) <= 115


def test_help_names_every_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    from evalq.cli.compare import PROTOCOL_NAMES
    from evalq.data.protocols import PROTOCOLS

    assert sorted(PROTOCOL_NAMES) == sorted(PROTOCOLS)


def test_evalq_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS) and "examples:" in out
