"""Speed beside quality, with the fake backend in real worker processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs

SMALL = (
    "--speed", "--speed-prompt", "16", "--speed-new", "5", "--speed-batch", "3", "--speed-repeats", "2",
)  # fmt: skip
STEP, WINDOW = 0.02, 0.01
TIMED = {"seconds_per_step": STEP, "seconds_per_window": WINDOW}


def kept(runs: Runs) -> list[Path]:
    return sorted((runs.folder / "store" / "speed").glob("*.json"))


def speed(runs: Runs, more: tuple[str, ...] = SMALL, **options: Any) -> dict[str, Any]:
    code, (record,) = runs.compare(runs.data(), runs.models({"options": TIMED | options}), more=more)
    assert code == 0 and record["status"] == "ok"
    found: dict[str, Any] = record["speed"]
    return found


def test_figures_follow_from_what_each_step_takes(runs: Runs) -> None:
    found = speed(runs)
    assert found["not_measured"] == {} and found["device"] == "cpu"
    settings = {"prompt_tokens": 16, "new_tokens": 5, "batch": 3, "repeats": 2}
    assert settings.items() <= found["settings"].items()
    windows = found["settings"]["windows"]
    # Sleeping takes at least as long as asked for, so every figure is at most, or at least, what follows.
    for name, most in (
        ("generation", 1 / STEP),
        ("generation_batch", 3 / STEP),
        ("scoring", 15 * windows / (windows * WINDOW)),
    ):
        one = found[name]
        assert 0 < one["low"] <= one["median"] <= one["high"] <= 1.001 * most, name
        assert one["median"] > most / 20 and one["repeats"] == 2
    assert found["first_token_seconds"]["low"] >= STEP


def test_kept_and_not_measured_again(runs: Runs) -> None:
    first = speed(runs)
    (file,) = kept(runs)
    before = file.stat().st_mtime_ns
    assert speed(runs) == first and kept(runs) == [file] and file.stat().st_mtime_ns == before
    assert speed(runs, (*SMALL, "-cc")) != first and kept(runs) == [file]


@pytest.mark.parametrize(
    ("more", "options"),
    [(("--speed-new", "6"), {}), (("--speed-batch", "2"), {}), ((), {"batch_windows": 2})],
)
def test_other_sizes_and_options_are_other_figures(
    runs: Runs, more: tuple[str, ...], options: dict[str, Any]
) -> None:
    speed(runs)
    speed(runs, (*SMALL, *more), **options)
    assert len(kept(runs)) == 2


def test_another_machine_measures_anew(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from evalq.run import speed as room

    speed(runs)
    here = room.environment()
    monkeypatch.setattr(room, "environment", lambda: here | {"cpu": "another"})
    speed(runs)
    assert len(kept(runs)) == 2


def test_only_what_is_missing_is_measured(runs: Runs) -> None:
    first = speed(runs)
    (file,) = kept(runs)
    content = json.loads(file.read_text())
    content["speed"]["scoring"] = None
    file.write_text(json.dumps(content))
    again = speed(runs)
    assert again["generation"] == first["generation"] and again["scoring"] is not None
    assert again["scoring"] != first["scoring"]


def test_damaged_file_is_measured_anew(runs: Runs) -> None:
    speed(runs)
    (file,) = kept(runs)
    file.write_text('{"speed": {"generation": "fast"}}')
    assert speed(runs)["generation"]["repeats"] == 2


def test_without_speed_nothing_is_measured(runs: Runs) -> None:
    _, (record,) = runs.compare(runs.data(), runs.models({}))
    assert record["speed"] is None and not kept(runs)


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [("no-generate", "fake does not generate here"), ("oom-generate", "out of memory")],
)
def test_an_engine_that_cannot_generate_keeps_its_quality(runs: Runs, misbehave: str, words: str) -> None:
    options = {"misbehave": misbehave}
    code, (record,) = runs.compare(runs.data(), runs.models({"options": options}), more=SMALL)
    assert code == 0 and record["status"] == "ok" and record["ppl"] > 0
    found = record["speed"]
    assert found["generation"] is None and found["scoring"] is not None
    assert set(found["not_measured"]) == {"generation", "generation_batch", "first_token_seconds"}
    assert all(words in why for why in found["not_measured"].values())
    (note,) = [note for note in record["notes"] if note.startswith("speed not measured")]
    assert words in note and "generating" in note


def test_a_worker_that_dies_while_timed_keeps_the_quality(runs: Runs) -> None:
    # The comparison scores 6 windows; the worker that is timed counts anew and is killed after 6 of its own.
    options = {"misbehave": "kill", "misbehave_after": 6}
    more = (*SMALL, "--speed-batch", "4")
    code, (record,) = runs.compare(runs.data(), runs.models({"options": options}), more=more)
    assert code == 0 and record["status"] == "ok"
    found = record["speed"]
    assert found["generation"] is not None and found["generation_batch"] is not None
    assert "SIGKILL" in found["not_measured"]["scoring"]
    assert json.loads(kept(runs)[0].read_text())["speed"]["generation"] == found["generation"]


def test_a_prompt_beyond_the_positions_is_said_before_loading(runs: Runs) -> None:
    config = json.loads((runs.tiny / "config.json").read_text())
    (runs.tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    more = (*SMALL, "--speed-prompt", "298", "--speed-new", "4")
    code, (record,) = runs.compare(runs.data(), runs.models({}), more=more)
    assert code == 0 and record["status"] == "ok"
    assert "need 301 positions, the model has 300" in record["speed"]["not_measured"]["generation"]
    assert record["speed"]["scoring"] is not None


def test_a_failed_model_is_not_timed(runs: Runs) -> None:
    code, (record,) = runs.compare(runs.data(), runs.models({"options": {"misbehave": "nan"}}), more=SMALL)
    assert code == 1 and record["speed"] is None and not kept(runs)


@pytest.mark.parametrize("more", [("--speed-batch", "0"), ("--speed-new", "-1"), ("--speed-repeats", "x")])
def test_impossible_sizes_are_usage_errors(
    runs: Runs, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        runs.compare(runs.data(), runs.models({}), more=("--speed", *more))
    assert caught.value.code == 2 and more[0] in capsys.readouterr().err


def test_one_new_token_shows_no_speed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = runs.compare(runs.data(), runs.models({}), more=("--speed", "--speed-new", "1"))
    assert code == 2 and not records
    assert "new tokens is 1, at least 2 is needed" in capsys.readouterr().err


def test_table_and_csv(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    csv = runs.folder / "out.csv"
    code, _ = runs.compare(runs.data(), runs.models({"options": TIMED}), more=(*SMALL, "--csv", str(csv)))
    shown = capsys.readouterr()
    assert code == 0
    for words in ("gen tok/s", "gen x3", "first ms", "score tok/s", "median of 2"):
        assert words in shown.out, words
    assert "measuring speed" in shown.err and "first token after" in shown.err
    header, row = csv.read_text().splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=False))
    assert float(cells["speed_generation"]) > 0 and cells["speed_batch"] == "3"
    assert float(cells["speed_scoring_low"]) <= float(cells["speed_scoring_high"])


def test_chart_of_quality_against_speed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    chart = runs.folder / "c.svg"
    models = runs.models({"options": TIMED}, {"options": TIMED | {"seed": 2}})
    more = (*SMALL[1:], "--chart-speed", "batch", "-o", str(chart))
    code, records = runs.compare(runs.data(), models, more=more)
    assert code == 0 and all(record["speed"] for record in records)
    assert chart.is_file() and f"chart: {chart}" in capsys.readouterr().err.replace("\n", "")
    more = ("--chart-speed", "--by-position", *SMALL[1:])
    code, _ = runs.compare(runs.data(), models, more=more)
    assert code == 2 and "two charts" in capsys.readouterr().err


def test_no_chart_without_speed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"options": {"misbehave": "no-generate"}})
    code, _ = runs.compare(runs.data(), models, more=(*SMALL, "--chart-speed"))
    assert code == 0 and "no chart: no model's speed was measured" in capsys.readouterr().err
