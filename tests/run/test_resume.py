"""Runs that are disturbed: files damaged under them, killed, cleared by others, out of disk."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_gguf
from conftest import Runs
from processes import children, wait_for

from evalq.results.store import Store

SLOW = {"options": {"seconds_per_window": 0.3}}


def parts(runs: Runs) -> list[Path]:
    return sorted((runs.folder / "store" / "results").glob("*/parts/[0-9]*.safetensors"))


def test_a_part_damaged_while_the_run_goes_on_is_scored_again(runs: Runs) -> None:
    data, models = runs.data(max_rows=10), runs.models(SLOW)
    process = runs.process("-d", str(data), "-m", str(models), "--json", "disturbed.json", "-q")
    wait_for(lambda: len(parts(runs)) >= 3)
    parts(runs)[1].write_bytes(b"damaged")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (disturbed,) = json.loads((runs.folder / "disturbed.json").read_text())
    _, (fresh,) = runs.compare(data, runs.models({}), more=("--store", str(runs.folder / "fresh")))
    assert (
        disturbed["ppl"] == fresh["ppl"] and disturbed["tokens_scored"] == fresh["tokens_scored"] == 10 * 255
    )


def test_a_part_removed_while_the_run_goes_on_is_scored_again(runs: Runs) -> None:
    data, models = runs.data(max_rows=8), runs.models(SLOW)
    process = runs.process("-d", str(data), "-m", str(models), "--json", "disturbed.json", "-q")
    wait_for(lambda: len(parts(runs)) >= 2)
    parts(runs)[0].unlink()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (disturbed,) = json.loads((runs.folder / "disturbed.json").read_text())
    assert disturbed["tokens_scored"] == 8 * 255
    assert not list(runs.folder.glob("store/results/*/parts"))


def test_clearing_beside_other_runs_ends_none_of_them(runs: Runs) -> None:
    data, models = runs.data(), runs.models({"options": {"seconds_per_window": 0.05}})
    arguments = ("-d", str(data), "-m", str(models), "-q")
    for trial in range(4):
        both = [
            runs.process(*arguments, "--json", f"{trial}-{i}.json", *(("-cc",) if i else ()))
            for i in range(3)
        ]
        errors = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0, 0], errors
        found = [json.loads((runs.folder / f"{trial}-{i}.json").read_text())[0]["ppl"] for i in range(3)]
        assert len(set(found)) == 1
    assert not list((runs.folder / "store").glob(".removed-*"))


def test_a_waiting_process_leaves_the_log_of_the_running_one(runs: Runs) -> None:
    data = runs.data()
    chatter = {"options": {"misbehave": "chatter", "seconds_per_window": 0.2}}
    both = [runs.process("-d", str(data), "-m", str(runs.models(chatter)), "-q") for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
    (log,) = (runs.folder / "store").glob("results/*/worker*.log")
    assert log.name == "worker.log" and "prints to standard output" in log.read_text()


@pytest.mark.parametrize("name", ["run.json", "record.json", "identity.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"null", b'{"notes": 7, "options": []}'])
def test_a_damaged_file_beside_the_scores_ends_nothing(runs: Runs, name: str, content: bytes) -> None:
    data, models = runs.data(), runs.models({})
    _, (before,) = runs.compare(data, models)
    (file,) = (runs.folder / "store").glob(f"results/*/{name}")
    file.write_bytes(content)
    code, (after,) = runs.compare(data, models)
    assert code == 0 and after["ppl"] == before["ppl"]


def test_a_killed_driver_leaves_the_environment_and_no_text_behind(runs: Runs) -> None:
    data, models = runs.data(), runs.models(SLOW)
    process = runs.process("-d", str(data), "-m", str(models), "-q", start_new_session=True)
    wait_for(lambda: parts(runs))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, (record,) = runs.compare(data, models)
    assert code == 0 and record["execution"]["environment"]["cpu"]
    assert record["execution"]["interpreter"]["packages"]
    left = {path.name for path in (runs.folder / "store").iterdir()}
    assert not [name for name in left if name.startswith(".text")], left


def test_a_full_disk_while_tokenizing_is_one_line(runs: Runs) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = runs.process("-d", str(runs.data()), "-m", str(runs.models({})), preexec_fn=small_files)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "cannot write" in errors.splitlines()[-1] and "free some space" in errors.splitlines()[-1]
    assert not list((runs.folder / "store").rglob("*.safetensors"))


def test_fewer_rows_of_a_stored_plan_are_not_scored_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalq.run import turn

    models = runs.models({})
    _, (many,) = runs.compare(runs.data(max_rows=9), models)

    def refuse(*given: object) -> None:
        raise AssertionError("stored windows are scored again")

    with monkeypatch.context() as patched:
        patched.setattr(turn, "run_worker", refuse)
        code, (few,) = runs.compare(runs.data(max_rows=4), models)
    assert code == 0 and few["tokens_scored"] == 4 * 255 and few["key"] != many["key"]
    assert few["tokens_per_second"] == pytest.approx(many["tokens_per_second"])
    code, (fresh,) = runs.compare(runs.data(max_rows=4), models, more=("--store", str(runs.folder / "fresh")))
    store = Store(runs.folder / "store")
    mine, theirs = (
        store.result(few["key"]).scores(),
        Store(runs.folder / "fresh").result(fresh["key"]).scores(),
    )
    assert mine is not None and theirs is not None and few["ppl"] == fresh["ppl"]
    assert np.array_equal(mine.columns["logprob"], theirs.columns["logprob"])


def test_more_rows_score_the_new_ones_only(runs: Runs) -> None:
    models = runs.models({"options": {"misbehave": "kill", "misbehave_after": 3}})
    data = runs.data(max_rows=3)
    assert runs.compare(data, models)[0] == 0
    # Three more windows are as many as this model can score before it is killed.
    code, (record,) = runs.compare(runs.data(max_rows=6), models)
    assert code == 0 and record["tokens_scored"] == 6 * 255


def test_a_renamed_gguf_file_is_the_same_model_and_a_changed_one_is_not(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalq.run import turn

    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    first = write_gguf(runs.folder / "first.gguf", {"token_embd.weight": values, "output.weight": values})
    data = runs.data()
    _, (before,) = runs.compare(data, runs.models({"model_dir": str(first)}))
    second = first.rename(runs.folder / "second.gguf")

    def refuse(*given: object) -> None:
        raise AssertionError("a stored model is scored again")

    with monkeypatch.context() as patched:
        patched.setattr(turn, "run_worker", refuse)
        code, (after,) = runs.compare(data, runs.models({"model_dir": str(second)}))
    assert code == 0 and (after["key"], after["ppl"]) == (before["key"], before["ppl"])
    write_gguf(second, {"token_embd.weight": values, "output.weight": values + 1})
    _, (changed,) = runs.compare(data, runs.models({"model_dir": str(second)}))
    assert changed["key"] != before["key"]


def test_without_its_files_a_finished_result_still_shows(runs: Runs) -> None:
    data, models = runs.data(), runs.models({}, {"options": {"seed": 1}})
    _, before = runs.compare(data, models)
    shutil.rmtree(runs.tiny)
    code, after = runs.compare(data, models, more=("-p", "-o", "chart.png"))
    assert code == 0 and [r["ppl"] for r in after] == [r["ppl"] for r in before]
    assert any(
        "does not exist" in note and note.startswith("a stored result of 20") for note in after[0]["notes"]
    )
    assert after[1]["against_reference"] is not None and (runs.folder / "chart.png").exists()
    code, missing = runs.compare(runs.data(max_rows=2), models)
    assert code == 1 and {r["error"]["category"] for r in missing} == {"model_missing"}


def test_a_removed_result_is_scored_anew_and_not_shown_from_memory(runs: Runs) -> None:
    data, models = runs.data(), runs.models({})
    runs.compare(data, models)
    shutil.rmtree(runs.folder / "store" / "results")
    shutil.rmtree(runs.tiny)
    code, (record,) = runs.compare(data, models)
    assert code == 1 and record["error"]["category"] == "model_missing"


def test_speed_is_shown_for_the_options_that_it_was_measured_with(runs: Runs) -> None:
    data = runs.data()
    _, (one,) = runs.compare(data, runs.models({"options": {"batch_windows": 1}}))
    _, (three,) = runs.compare(data, runs.models({"options": {"batch_windows": 3}}))
    assert one["tokens_per_second"] is not None and one["key"] == three["key"]
    assert three["tokens_per_second"] is None and three["peak_memory_gib"] is None
    assert any("scored with batch_windows 1" in note for note in three["notes"])
    _, (again,) = runs.compare(data, runs.models({"options": {"batch_windows": 1}}))
    assert again["tokens_per_second"] == one["tokens_per_second"]


def test_a_worker_that_holds_the_interpreter_ends_with_its_parent(runs: Runs) -> None:
    models = runs.models({"options": {"misbehave": "hold-interpreter"}})
    process = runs.process("-d", str(runs.data()), "-m", str(models), "-q", start_new_session=True)
    wait_for(lambda: list((runs.folder / "store").glob("results/*/identity.json")))
    wait_for(lambda: children(process.pid))
    time.sleep(2)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert workers
