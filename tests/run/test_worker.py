"""The message to a worker, and workers that must refuse it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs

from evalq.data.windows import ProtocolSettings
from evalq.engine.columns import DEFAULT_COLUMNS
from evalq.errors import ModelError
from evalq.run import process, turn
from evalq.run.job import ScoreJob, TextJob, TokenizeJob, from_line, to_line
from evalq.version import JOB_VERSION


def score_job(folder: Path) -> ScoreJob:
    text = TextJob(
        name="sample",
        tokens_file=str(folder / "tokens"),
        max_tokens=None,
        settings=ProtocolSettings("gptq", 16, prefix_ids=(1, 2)),
        plan_digest="0" * 64,
        columns=DEFAULT_COLUMNS,
        result_dir=str(folder / "results" / "r"),
        identity={"a": [1, 2.5, None, "ä"]},
    )
    return ScoreJob(
        load="fake",
        forward="fake",
        load_fn="fake",
        path=str(folder),
        options={"seed": 3, "mode": "hashed"},
        trust_remote_code=False,
        texts=(text, text.model_copy(update={"name": "code", "reference": "/reference"})),
    )


def test_a_job_survives_the_way_to_the_worker(tmp_path: Path) -> None:
    job = score_job(tmp_path)
    assert from_line(to_line(job)) == job and to_line(job).count("\n") == 1
    text = TokenizeJob(
        backend="fake",
        path="/x",
        trust_remote_code=False,
        documents=("one\ntwo", "ä🙂"),
        add_special=True,
        chat_template=False,
        out="/y",
    )
    assert from_line(to_line(text)) == text


@pytest.mark.parametrize(
    "changed",
    [
        lambda raw: raw | {"job_version": JOB_VERSION + 1},
        lambda raw: {k: v for k, v in raw.items() if k != "job_version"},
        lambda raw: raw | {"something": "new"},
        lambda raw: raw | {"texts": 7},
        lambda raw: raw | {"texts": []},
        lambda raw: {"job_version": JOB_VERSION},
        lambda raw: [raw],
        lambda raw: "score",
    ],
)
def test_a_message_of_another_version_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, changed: Any
) -> None:
    line = json.dumps(changed(json.loads(to_line(score_job(tmp_path)))))
    with pytest.raises(ModelError, match=r"-m pip install -U evalq") as caught:
        from_line(line)
    assert caught.value.category == "engine_missing"
    events = worker_says(line + "\n")
    assert events[-1]["event"] == "failed" and events[-1]["category"] == "engine_missing"


def worker_says(line: str) -> list[dict[str, Any]]:
    """Events of a worker. Its standard input stays open: its end means that the parent is gone."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-m", "evalq.run.worker"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(line)
        worker.stdin.flush()
        return [json.loads(event) for event in worker.stdout]


def test_a_worker_that_cuts_other_windows_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = turn.run_worker

    def other_windows(job: Any, *rest: Any) -> None:
        texts = tuple(text.model_copy(update={"plan_digest": "f" * 64}) for text in job.texts)
        real(job.model_copy(update={"texts": texts}), *rest)

    monkeypatch.setattr(turn, "run_worker", other_windows)
    code, (record,) = runs.compare(runs.data(), runs.models({}))
    assert code == 1 and record["error"]["category"] == "engine_missing"
    assert "cuts other windows" in record["error"]["message"]
    assert "pip install -U evalq" in record["error"]["remedy"]
    assert not list(runs.folder.glob("store/results/*/scores.safetensors"))


def test_an_interpreter_whose_evalq_reads_other_messages_is_not_started(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = process.ask(None).__class__("/opt/python", "3.12.0", "0.0.9", None, {"evalq": "0.0.9"})
    monkeypatch.setattr(process, "ask", lambda python: other)
    code, _ = runs.compare(runs.data(), runs.models({}))
    assert code == 2  # already the tokenizer's worker


@pytest.mark.parametrize("seconds", ["1e9", "0.5e9"])
def test_a_time_limit_of_decades_can_be_waited_for(runs: Runs, seconds: str) -> None:
    code, (record,) = runs.compare(runs.data(), runs.models({}), more=("--timeout", seconds))
    assert code == 0 and record["status"] == "ok"


def test_ids_before_every_window_are_checked_against_the_vocabulary(runs: Runs) -> None:
    data = runs.data(bos="every_window")
    code, (fits, small) = runs.compare(
        data, runs.models({"options": {"vocab_size": 257}}, {"options": {"vocab_size": 256}})
    )
    assert fits["status"] == "ok" and code == 1
    assert small["error"]["category"] == "tokenizer_mismatch"
    assert "before every window has token id 256" in small["error"]["message"]


def test_a_column_that_a_model_knows_a_bound_of_has_another_name(runs: Runs) -> None:
    _, (exact, bound) = runs.compare(runs.data(), runs.models({}, {"options": {"misbehave": "no-top1"}}))
    assert exact["top1"] is not None and "top1_bound" not in exact["metrics"]
    assert bound["top1"] is None and 0 < bound["metrics"]["top1_bound"]["value"] < exact["top1"]


@pytest.mark.parametrize(("name", "value"), [("batch_windows", 0), ("batch_windows", -3), ("vocab_size", 0)])
def test_an_option_below_its_smallest_value_is_told_before_anything_is_scored(
    runs: Runs, capsys: pytest.CaptureFixture[str], name: str, value: int
) -> None:
    code, records = runs.compare(runs.data(), runs.models({}, {"options": {name: value}}))
    assert code == 2 and not records
    assert f"models[1].options.{name}: should be 1 or more, not {value}" in capsys.readouterr().err
    assert not (runs.folder / "store" / "results").exists()


def test_two_engines_for_one_model_are_refused_before_anything_is_scored(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("fake", "hf"), ("hf", "fake"), ("gguf", "hf"), ("vllm", "server"), ("exl3", "gguf")]
    for load, forward in pairs:
        code, records = runs.compare(runs.data(), runs.models({}, {"load_fn": load, "fwd_fn": forward}))
        assert code == 2 and not records, (load, forward)
        assert f'"{forward}" cannot score what "{load}" loads' in capsys.readouterr().err


def test_a_tokenizer_folder_without_files_is_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.folder / "nothing").mkdir()
    code, _ = runs.compare(runs.data(tokenizer_dir=str(runs.folder / "nothing")), runs.models({}))
    assert code == 2 and "holds no tokenizer files" in capsys.readouterr().err
