"""Several texts in one run: one load, a result a text, and failures that stay where they belong."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tiny
from conftest import Runs
from processes import wait_for

from evalq.run import turn


class Heard:
    """What workers were sent and what they said."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.events: list[dict[str, Any]] = []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def loads(self) -> int:
        return len(self.of("loading"))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    real, found = turn.run_worker, Heard()

    def run_worker(job: Any, settings: Any, on_event: Any) -> None:
        found.jobs.append(job)

        def both(event: dict[str, Any]) -> None:
            found.events.append(event)
            on_event(event)

        real(job, settings, both)

    monkeypatch.setattr(turn, "run_worker", run_worker)
    yield found


def texts(runs: Runs, *lengths: int, rows: int = 3) -> list[Path]:
    """Data specs on the shipped sample, told apart by the length of their windows."""
    return [
        runs.data(f"{length}.json", eval_len=length, eval_stride=length, max_rows=rows) for length in lengths
    ]


def of_model(records: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [record for record in records if record["label"] == label]


def test_each_model_is_loaded_once_and_its_results_are_those_of_single_runs(runs: Runs, heard: Heard) -> None:
    data, models = texts(runs, 64, 128, 96), runs.models({}, {"options": {"seed": 1}})
    code, records = runs.compare(data, models)
    assert code == 0 and heard.loads == 2
    named = [(record["label"], record["comparison"]["eval_len"]) for record in records]
    assert named == [(label, n) for label in ("Fake 0", "Fake 1") for n in (64, 128, 96)]
    for i, one in enumerate(data):
        alone = runs.compare(one, models)[1]
        assert [r["key"] for r in alone] == [r["key"] for r in records[i::3]]
        assert [r["ppl"] for r in alone] == [r["ppl"] for r in records[i::3]]
        assert alone[1]["against_reference"] == records[3 + i]["against_reference"]
    assert heard.loads == 2, "single runs find what the run of all has stored"


def test_a_worker_is_sent_only_the_texts_that_are_not_stored(runs: Runs, heard: Heard) -> None:
    data, models = texts(runs, 64, 128, 96), runs.models({})
    runs.compare(data[1], models)
    runs.compare(data, models)
    assert [len(job.texts) for job in heard.jobs] == [1, 2]
    runs.compare(list(reversed(data)), models)
    assert heard.loads == 2, "all are stored, in whatever order"


def test_a_killed_run_continues_inside_a_text(runs: Runs, heard: Heard) -> None:
    data, slow = texts(runs, 64, 128, rows=8), runs.models({"options": {"seconds_per_window": 0.3}})
    process = runs.process("-d", *map(str, data), "-m", str(slow), "-q", start_new_session=True)
    results = runs.folder / "store" / "results"

    def kept_of_second() -> list[Path]:
        """The first text's are removed when it is done."""
        done = {file.parent for file in results.glob("*/scores.safetensors")}
        parts = list(results.glob("*/parts/*.safetensors"))
        return [part for part in parts if done and not done & set(part.parents)]

    wait_for(lambda: len(kept_of_second()) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    n_kept = len(kept_of_second())
    assert 2 <= n_kept < 8

    code, records = runs.compare(data, slow)
    assert code == 0 and [len(job.texts) for job in heard.jobs] == [1]
    assert heard.of("progress")[0]["windows"] == n_kept
    fresh = runs.compare(data, runs.models({}), more=("--store", str(runs.folder / "fresh")))[1]
    assert [r["ppl"] for r in records] == [r["ppl"] for r in fresh]


def test_a_text_too_long_for_a_model_fails_alone(runs: Runs, heard: Heard, tmp_path: Path) -> None:
    short = make_tiny(tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 100}
    (short / "config.json").write_text(json.dumps(config))
    code, records = runs.compare(texts(runs, 64, 128, 96), runs.models({"model_dir": str(short)}))
    assert code == 1 and heard.loads == 1
    assert [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"]["category"] == "window_too_long" and records[1]["layer_bpw"] == 16


def test_what_only_the_loaded_model_knows_fails_one_text_and_not_the_others(runs: Runs, heard: Heard) -> None:
    data = [*texts(runs, 64), runs.data("bos.json", bos="every_window", eval_len=64), *texts(runs, 96)]
    code, records = runs.compare(data, runs.models({"options": {"vocab_size": 256}}))
    assert code == 1 and heard.loads == 1
    assert [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"]["category"] == "tokenizer_mismatch"


def test_out_of_memory_on_one_text_leaves_the_others(runs: Runs, heard: Heard) -> None:
    options = {"misbehave": "oom-forward", "misbehave_from": 128}
    code, records = runs.compare(texts(runs, 64, 128, 96), runs.models({"options": options}))
    assert code == 1 and [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"]["category"] == "oom_forward"
    # The second worker has half as much at once, the third goes on without the text.
    assert [(len(job.texts), job.divide_work) for job in heard.jobs] == [(3, 1), (2, 2), (1, 2)]


def test_a_worker_that_dies_in_a_text_is_followed_by_one_for_the_others_once(
    runs: Runs, heard: Heard, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"misbehave": "kill", "misbehave_from": 128, "misbehave_after": 3}
    code, records = runs.compare(texts(runs, 64, 128, 96), runs.models({"options": options}))
    assert code == 1 and [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"]["category"] == "host_oom_or_killed"
    assert [len(job.texts) for job in heard.jobs] == [3, 1]
    assert "a new worker goes on with the other texts" in capsys.readouterr().err


def test_a_second_death_ends_the_turn_and_the_next_model_has_its_own(runs: Runs, heard: Heard) -> None:
    options = {"misbehave": "segfault", "misbehave_from": 128}
    models = runs.models({"options": options}, {"options": {"seed": 1}})
    code, records = runs.compare(texts(runs, 64, 128, 160, 96), models)
    bad, good = of_model(records, "Fake 0"), of_model(records, "Fake 1")
    assert code == 1 and [r["status"] for r in bad] == ["ok", "failed", "failed", "failed"]
    assert all(r["status"] == "ok" for r in good)
    assert {r["error"]["category"] for r in bad[1:]} == {"crashed"}
    assert "was not tried" in bad[3]["error"]["message"]
    assert [len(job.texts) for job in heard.jobs] == [4, 2, 4]


def test_a_failure_to_load_is_every_texts(runs: Runs, heard: Heard) -> None:
    code, records = runs.compare(texts(runs, 64, 128), runs.models({"options": {"misbehave": "oom-load"}}))
    assert code == 1 and {r["error"]["category"] for r in records} == {"oom_load"}
    assert [len(job.texts) for job in heard.jobs] == [2]


def test_a_timeout_keeps_the_texts_that_are_done(runs: Runs, heard: Heard) -> None:
    options = {"misbehave": "hang", "misbehave_from": 128}
    code, records = runs.compare(
        texts(runs, 64, 128, 96), runs.models({"options": options}), more=("--timeout", "12")
    )
    assert code == 1 and [r["status"] for r in records] == ["ok", "failed", "failed"]
    assert {r["error"]["category"] for r in records[1:]} == {"timeout"} and len(heard.jobs) == 1


def test_where_the_reference_fails_on_one_text_another_takes_its_place_there(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = make_tiny(tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 100}
    (short / "config.json").write_text(json.dumps(config))
    first = {"label": "First", "model_dir": str(short)}
    models = runs.models(first, {"label": "Second"}, {"label": "Third", "options": {"seed": 1}})
    code, records = runs.compare(texts(runs, 64, 128), models)
    assert code == 1
    against = {
        (r["label"], r["comparison"]["eval_len"]): (r["against_reference"] or {}).get("label")
        for r in records
    }
    assert against[("Third", 64)] == "First" and against[("Third", 128)] == "Second"
    assert '128: the reference "First" was not scored: another one takes its place' in capsys.readouterr().err


def test_one_text_named_twice_is_refused_in_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = runs.data("a.json"), runs.data("b.json", dataset="sample")
    code, records = runs.compare([one, same], runs.models({}))
    assert code == 2 and not records and not (runs.folder / "store" / "results").exists()
    assert "number 1 and number 2 are the same windows of the same text" in capsys.readouterr().err


def test_notes_of_one_text_do_not_reach_the_next(runs: Runs) -> None:
    data = [runs.data("bos.json", bos="never", eval_len=64), *texts(runs, 96)]
    once = {"misbehave": "oom-forward-once", "misbehave_from": 96}
    _, (first, second) = runs.compare(data, runs.models({"options": once}))
    assert not any("half as much" in note for note in first["notes"])
    assert any("half as much" in note for note in second["notes"])


def test_long_windows_go_apart_from_those_that_are_scored_in_steps(runs: Runs, heard: Heard) -> None:
    long = runs.data("long.json", protocol="long", eval_len=10_000, eval_stride=None, max_rows=1)
    whole = runs.data("whole.json", eval_len=9_000, eval_stride=9_000, max_rows=1)
    short, models = texts(runs, 64), runs.models({})
    code, records = runs.compare([long, whole, *short], models)
    assert code == 0 and [len(job.texts) for job in heard.jobs] == [2, 1]
    assert [r["comparison"]["eval_len"] for r in records] == [10_000, 9_000, 64]
    runs.compare([long, *short], models, more=("-cc",))
    assert [len(job.texts) for job in heard.jobs[2:]] == [2], "short windows are not split by steps"
