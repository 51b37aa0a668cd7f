"""A KV cache as an option: the record says it, and one that is not read is refused."""

import json
from typing import Any

import pytest
from conftest import Runs


def cached(cache: str, **more: Any) -> dict[str, Any]:
    return {"label": None, "options": {"kv_cache": cache} | more}


def test_record_label_and_table_say_the_cache(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "plain"}, cached("q8_0/q4_0"), cached("fp16"))
    code, (plain, apart, half) = runs.compare(runs.data(), models, more=("--csv", "out.csv"))
    assert code == 0 and [r["label"] for r in (apart, half)] == ["tiny kv q8_0/q4_0", "tiny kv fp16"]
    assert (plain["kv_cache"], plain["kv_bits"], plain["kv_bits_k"]) == (None, 32, 32)
    assert (apart["kv_cache"], apart["kv_bits"], apart["kv_bits_k"], apart["kv_bits_v"]) == (
        "q8_0/q4_0", 6.5, 8.5, 4.5,
    )  # fmt: skip
    assert half["kv_cache"] == "fp16" and half["kv_bits"] == 16 and not half["derived"]
    assert apart["derived"] and plain["is_reference"] and apart["against_reference"]["label"] == "plain"
    shown = capsys.readouterr().out
    assert "KV bits" in shown and "6.5 (8.5/4.5)" in shown
    header, *rows = (runs.folder / "out.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), rows[1].split(","), strict=False))
    assert (cells["kv_cache"], cells["kv_bits"]) == ("q8_0/q4_0", "6.5")


def test_table_is_as_before_without_a_quantized_cache(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.compare(runs.data(), runs.models({}))
    assert "KV bits" not in capsys.readouterr().out


def test_auto_is_the_same_result_as_no_option(runs: Runs) -> None:
    _, (one,) = runs.compare(runs.data(), runs.models({}))
    _, (other,) = runs.compare(runs.data(), runs.models({"options": {"kv_cache": "auto"}}))
    assert one["key"] == other["key"]


def test_cache_that_is_not_read_is_refused(runs: Runs) -> None:
    models = runs.models(cached("q8_0", misbehave="ignore-cache"), cached("q4_0"))
    code, (ignored, read) = runs.compare(runs.data(), models)
    assert code == 1 and read["status"] == "ok"
    error = ignored["error"]
    assert error["category"] == "not_measured"
    assert (
        "with other numbers in the q8_0 cache the scores of a window of 256 tokens are the same bit for bit"
        in (error["message"])
    )
    assert 'leave "kv_cache" out' in error["remedy"]
    assert "\n" not in error["message"] and ignored["kv_bits"] == 8.5


def test_an_engine_that_cannot_tell_is_said_so_and_held_against_stored_results(runs: Runs) -> None:
    hidden = cached("q8_0", misbehave="hide-cache")
    _, (alone,) = runs.compare(runs.data(), runs.models(hidden))
    assert alone["status"] == "ok"
    assert "whether the KV cache in q8_0 is read was not checked: the engine cannot tell" in alone["notes"]
    plain = {"options": {"misbehave": "hide-cache"}}
    code, (_, found) = runs.compare(runs.data(), runs.models(plain, hidden))
    assert code == 1 and found["error"]["category"] == "not_measured"
    message = found["error"]["message"]
    assert "every score with the q8_0 cache is, bit for bit, the one with the unquantized cache" in message


def test_unquantized_cache_needs_no_check(runs: Runs) -> None:
    code, (record,) = runs.compare(runs.data(), runs.models(cached("fp16", misbehave="ignore-cache")))
    assert code == 0 and record["status"] == "ok"


def test_killed_run_goes_on_after_the_check(runs: Runs) -> None:
    data = runs.data()
    killed = cached("q4_0", misbehave="kill", misbehave_after=3)
    code, (record,) = runs.compare(data, runs.models(killed))
    assert code == 1 and record["error"]["category"] == "host_oom_or_killed"
    plain_file = next((runs.folder / "store" / "results").glob("*/identity.json"))
    assert json.loads(plain_file.read_text())["options"]["kv_cache"] == "q4_0"


def test_chart_against_bits_of_the_cache(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "Fake plain"}, cached("q8_0") | {"label": "Fake kv8"})
    code, _ = runs.compare(runs.data(), models, more=("--kv-bits", "-o", "chart.svg"))
    assert code == 0 and "bits per element of the KV cache" in (runs.folder / "chart.svg").read_text()
    with pytest.raises(SystemExit):
        runs.compare(runs.data(), models, more=("--kv-bits", "-v", "-p"))
    assert "not allowed with argument" in capsys.readouterr().err
