"""The whole way from specs to records, with the fake backend in real worker processes."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import llama, llama_config, make_tiny, plain, write_model
from conftest import Runs
from processes import children, wait_for
from safetensors.numpy import load_file


def only_result(runs: Runs) -> Path:
    found = list((runs.folder / "store" / "results").iterdir())
    assert len(found) == 1
    return found[0]


def test_uniform_model_has_ppl_of_its_vocabulary(runs: Runs) -> None:
    models = runs.models({"options": {"mode": "uniform"}}, {"options": {"mode": "oracle"}})
    code, records = runs.compare(runs.data(), models)
    assert code == 0
    assert [r["status"] for r in records] == ["ok", "ok"]
    assert records[0]["ppl"] == pytest.approx(65536)
    assert records[1]["ppl"] == 1.0
    assert records[0]["tokens_scored"] == 6 * 255
    assert records[0]["layer_bpw"] == 16 and records[0]["vram_gb"] == pytest.approx(
        (258 * 8 + 128) * 2 / 2**30
    )


def test_record_tells_what_it_is(runs: Runs) -> None:
    _, (record,) = runs.compare(runs.data(), runs.models({}))
    identity = record["identity"]
    assert (
        len(identity["tokens_sha256"]) == len(identity["text_sha256"]) == len(identity["model_digest"]) == 64
    )
    assert identity["protocol"] == record["protocol"] == "exllamav3"
    assert (identity["eval_len"], identity["eval_stride"], identity["bos"]) == (256, 128, "default")
    assert record["execution"]["environment"]["ram_gib"] > 0
    assert record["ppl_stderr"] > 0 and not record["ppl_stderr_is_lower_bound"]
    low, high = (record["metrics"]["ppl"][end] for end in ("low", "high"))
    assert low < record["ppl"] < high
    assert record["load_seconds"] >= 0 and record["tokens_per_second"] > 0


def test_same_command_again_scores_nothing(runs: Runs) -> None:
    data, models = runs.data(), runs.models({"options": {"seconds_per_window": 0.1}})
    _, first = runs.compare(data, models)
    scores = only_result(runs) / "scores.safetensors"
    before = scores.stat().st_mtime_ns
    _, again = runs.compare(data, models)
    assert scores.stat().st_mtime_ns == before
    assert again == first


def test_clear_cache_removes_only_what_is_named(runs: Runs) -> None:
    data = runs.data()
    keep, redo = (
        runs.models({"label": "A keep"}, name="a.json"),
        runs.models({"label": "B redo", "options": {"seed": 1}}, name="b.json"),
    )
    _, (kept, redone) = runs.compare(data, keep, redo)
    root = runs.folder / "store" / "results"
    times = {
        key: (root / key / "scores.safetensors").stat().st_mtime_ns for key in (kept["key"], redone["key"])
    }
    code, _ = runs.compare(data, redo, more=("-cc",))
    assert code == 0
    assert (root / kept["key"] / "scores.safetensors").stat().st_mtime_ns == times[kept["key"]]
    assert (root / redone["key"] / "scores.safetensors").stat().st_mtime_ns > times[redone["key"]]


def test_replaced_weights_are_noticed(runs: Runs, tmp_path: Path) -> None:
    data, models = runs.data(), runs.models({})
    _, (first,) = runs.compare(data, models)
    file = runs.tiny / "model.safetensors"
    stat = file.stat()
    shutil.copyfile(make_tiny(tmp_path / "other", seed=1) / "model.safetensors", file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    _, (second,) = runs.compare(data, models)
    assert first["key"] != second["key"]


def test_execution_options_share_a_result_and_numeric_ones_do_not(runs: Runs) -> None:
    _, (one,) = runs.compare(runs.data(), runs.models({}))
    _, (batched,) = runs.compare(runs.data(), runs.models({"options": {"batch_windows": 3}}))
    _, (other,) = runs.compare(runs.data(), runs.models({"options": {"seed": 5}}))
    assert one["key"] == batched["key"] != other["key"]


def test_killed_run_continues_and_gives_the_same_bits(runs: Runs) -> None:
    slow = {"options": {"seconds_per_window": 0.3}}
    data, models = runs.data(max_rows=12), runs.models(slow)
    process = runs.process("-d", str(data), "-m", str(models), "-q", start_new_session=True)
    parts = runs.folder / "store" / "results"
    wait_for(lambda: len(list(parts.glob("*/parts/*.safetensors"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("*/parts/*.safetensors")}
    assert 3 <= len(kept) < 12

    code, (resumed,) = runs.compare(data, models)
    assert code == 0
    whole = runs.models({"options": {}})
    code, (fresh,) = runs.compare(data, whole, more=("--store", str(runs.folder / "fresh")))
    a = load_file(parts / resumed["key"] / "scores.safetensors")
    b = load_file(runs.folder / "fresh" / "results" / fresh["key"] / "scores.safetensors")
    assert all(np.array_equal(a[name], b[name]) for name in ("logprob", "top1", "window"))
    assert resumed["ppl"] == fresh["ppl"] and resumed["tokens_scored"] == 12 * 255


def test_worker_ends_with_its_parent(runs: Runs) -> None:
    models = runs.models({"options": {"misbehave": "hang"}})
    process = runs.process("-d", str(runs.data()), "-m", str(models), "-q", start_new_session=True)
    log = runs.folder / "store" / "results"
    wait_for(lambda: list(log.glob("*/worker*.log")))
    time.sleep(1)
    workers = [pid for pid in children(process.pid)]
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_interrupt_ends_the_worker_and_exits_130(runs: Runs) -> None:
    models = runs.models({"options": {"seconds_per_window": 0.5}})
    # A shell's background jobs, and so their children, start with SIGINT ignored.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = runs.process("-d", str(runs.data(max_rows=50)), "-m", str(models), **listening)
    store = runs.folder / "store" / "results"
    wait_for(lambda: list(store.glob("*/parts/*.safetensors")))
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_two_runs_on_one_store_at_once(runs: Runs) -> None:
    data, models = runs.data(), runs.models({"options": {"seconds_per_window": 0.2}})
    both = [runs.process("-d", str(data), "-m", str(models), "--json", f"{i}.json") for i in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    first, second = (json.loads((runs.folder / f"{i}.json").read_text())[0] for i in range(2))
    assert first["ppl"] == second["ppl"] and first["key"] == second["key"]
    assert only_result(runs).name == first["key"]
    assert first["execution"]["seconds"] == second["execution"]["seconds"], (
        "one of them scored, the other waited"
    )


@pytest.mark.parametrize(
    ("misbehave", "category"),
    [
        ("oom-load", "oom_load"),
        ("oom-forward", "oom_forward"),
        ("kill", "host_oom_or_killed"),
        ("segfault", "crashed"),
        ("nan", "non_finite"),
        ("wrong-shape", "engine_error"),
    ],
)
def test_one_failure_leaves_the_others_untouched(runs: Runs, misbehave: str, category: str) -> None:
    bad = {"label": "Bad one", "options": {"misbehave": misbehave, "seed": 1}}
    code, (before, failed, after) = runs.compare(runs.data(), runs.models({}, bad, {"options": {"seed": 2}}))
    assert code == 1
    assert (before["status"], failed["status"], after["status"]) == ("ok", "failed", "ok")
    assert failed["error"]["category"] == category
    assert failed["error"]["message"] and failed["error"]["remedy"]
    assert failed["ppl"] is None and failed["layer_bpw"] == 16


def test_out_of_memory_while_scoring_is_tried_once_more_with_half(runs: Runs) -> None:
    once = {"misbehave": "oom-forward-once", "misbehave_after": 2, "batch_windows": 2}
    same = {"batch_windows": 2}
    code, (record, expected) = runs.compare(runs.data(), runs.models({"options": once}, {"options": same}))
    assert code == 0 and record["ppl"] == expected["ppl"]
    assert (record["execution"]["batch_windows"], expected["execution"]["batch_windows"]) == (1, 2)
    assert any("half as much at once" in note for note in record["notes"])


def test_timeout_is_a_failure_that_keeps_what_was_scored(runs: Runs) -> None:
    slow = runs.models({"options": {"seconds_per_window": 0.4, "seed": 3}})
    code, (failed,) = runs.compare(runs.data(max_rows=30), slow, more=("--timeout", "4"))
    assert code == 1 and failed["error"]["category"] == "timeout"
    assert list(only_result(runs).glob("parts/*.safetensors"))


def test_few_non_finite_tokens_are_counted_and_noted(runs: Runs) -> None:
    _, (record,) = runs.compare(runs.data(), runs.models({"options": {"misbehave": "some-nan"}}))
    assert record["status"] == "ok"
    assert record["tokens_nonfinite"] == 6
    assert np.isfinite(record["ppl"])
    assert any("6 of 1530" in note for note in record["notes"])


def test_engine_that_prints_does_not_disturb(runs: Runs) -> None:
    code, (record,) = runs.compare(runs.data(), runs.models({"options": {"misbehave": "chatter"}}))
    assert code == 0 and record["status"] == "ok"
    assert "prints to standard output" in (only_result(runs) / "worker.log").read_text()


def test_reference_is_scored_first_and_shown_in_its_place(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    models = runs.models({"label": "A quant"}, {"label": "B full", "out_logits": "x", "options": {"seed": 1}})
    _, records = runs.compare(runs.data(), models)
    assert [r["label"] for r in records] == ["A quant", "B full"]
    shown = capsys.readouterr().err
    assert shown.index("B full: PPL") < shown.index("A quant: PPL")


def test_window_longer_than_positions(runs: Runs, tmp_path: Path) -> None:
    short = make_tiny(tmp_path / "short", max_position_embeddings=100)
    code, (record,) = runs.compare(runs.data(), runs.models({"model_dir": str(short)}))
    assert code == 1 and record["error"]["category"] == "window_too_long"
    assert "255" in record["error"]["message"] and "100" in record["error"]["message"]


def test_every_protocol_runs(runs: Runs) -> None:
    for protocol in ("exllamav3", "qbench", "hf-strided", "gptq", "llama.cpp", "lm-eval"):
        data = runs.data(protocol=protocol, eval_stride=None, max_rows=2)
        code, (record,) = runs.compare(data, runs.models({"options": {"mode": "uniform"}}))
        assert code == 0, protocol
        assert record["ppl"] == pytest.approx(65536), protocol
        assert (record["word_ppl"] is not None) == (protocol == "lm-eval")


def test_read_only_store_is_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = runs.write("file", "not a folder")
    code, records = runs.compare(runs.data(), runs.models({}), more=("--store", str(blocked / "store")))
    err = capsys.readouterr().err
    assert code == 2 and records == []
    assert "cannot be written" in err and "--store" in err and len(err.strip().splitlines()) == 1


def test_full_disk_loses_nothing_stored(runs: Runs) -> None:
    """A limit on file size stands for a full disk: write() fails in the middle of a run."""
    import resource

    small, large = (
        runs.models({}, name="small.json"),
        runs.models({"label": "Big", "options": {"seed": 9}}, name="large.json"),
    )
    assert runs.compare(runs.data(), small)[0] == 0
    kept = only_result(runs) / "scores.safetensors"
    before = kept.read_bytes()
    long = runs.write(
        "long.json", json.loads(runs.data().read_text()) | {"eval_len": 4096, "eval_stride": 4096}
    )
    limit = 16_000  # more than a token file's header, less than 4095 scores of 5 bytes

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert runs.compare(long, small)[0] == 0  # tokens are stored already
    process = runs.process("-d", str(long), "-m", str(large), preexec_fn=full)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "cannot write" in errors and "free some space" in errors and "Traceback" not in errors
    assert kept.read_bytes() == before
    assert runs.compare(long, large)[0] == 0


def test_models_are_compared_token_by_token_with_the_reference(runs: Runs) -> None:
    models = runs.models(
        {"label": "Full", "out_logits": "x"}, {"options": {"seed": 1}}, {"options": {"misbehave": "kill"}}
    )
    _, (full, other, failed) = runs.compare(runs.data(), models)
    against = other["against_reference"]
    assert full["against_reference"] is None and failed["against_reference"] is None
    assert against["label"] == "Full"
    assert against["ppl_ratio"] == pytest.approx(other["ppl"] / full["ppl"])
    assert against["ln_ratio"] == pytest.approx(np.log(other["ppl"] / full["ppl"]))
    a, b = (
        load_file(runs.folder / "store" / "results" / r["key"] / "scores.safetensors") for r in (other, full)
    )
    difference = b["logprob"].astype(float) - a["logprob"]
    # Six windows of 256 that overlap by half cover 896 tokens: three stretches, from token 1 on.
    token = 1 + (128 * np.arange(6)[:, None] + np.arange(255)).ravel()
    sums = np.bincount((token - 1) * 3 // 895, weights=difference - difference.mean())
    assert against["ln_ratio_stderr"] == pytest.approx(np.sqrt(3 / 2 * (sums**2).sum()) / difference.size)
    low, high = (against["metrics"]["ln_ratio"][end] for end in ("low", "high"))
    assert high - low == pytest.approx(2 * 4.302653 * against["ln_ratio_stderr"])
    assert against["significant"] == (not low <= 0 <= high)


def test_reference_is_the_one_with_most_bits_unless_marked(runs: Runs) -> None:
    few = {
        "label": "Few",
        "override_bpw_layer": 4.0,
        "override_bpw_head": 6.0,
        "override_vram_bits": 8 * 2**30,
    }
    _, (small, large) = runs.compare(runs.data(), runs.models(few, {"label": "Many", "options": {"seed": 1}}))
    assert small["against_reference"]["label"] == "Many" and large["against_reference"] is None
    assert (small["layer_bpw"], small["head_bpw"], small["vram_gb"]) == (4.0, 6.0, 1.0)


def test_findings_that_the_spec_ignores(runs: Runs, tmp_path: Path) -> None:
    """Files that contradict themselves are not scored, unless the spec says so; then the record does, too."""
    broken = str(make_tiny(tmp_path / "broken", num_hidden_layers=2))
    models = runs.models(
        {"model_dir": broken},
        {"model_dir": broken, "ignore_findings": ["missing-layer"]},
        {"model_dir": broken, "ignore_findings": True},
        {"model_dir": broken, "ignore_findings": ["other"]},
    )
    code, (refused, named, every, other) = runs.compare(runs.data(), models)
    assert code == 1
    assert [record["status"] for record in (refused, named, every, other)] == ["failed", "ok", "ok", "failed"]
    assert '"ignore_findings": ["missing-layer"]' in refused["error"]["remedy"]
    assert any(note.startswith("ignored, as the spec says: missing-layer") for note in named["notes"])


def test_a_rule_of_thumb_is_a_note(runs: Runs, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 16}
    shapes = llama(llama_config(8, 16, 1, 1, 258, 4), head=None) | plain("model.layers.0.mlp.unused", 4, 4)
    facts = config | {"model_type": "llama", "vocab_size": 258, "tie_word_embeddings": True}
    extra = str(write_model(tmp_path / "extra", shapes, facts))
    code, (record,) = runs.compare(runs.data(), runs.models({"model_dir": extra}))
    assert code == 0 and record["status"] == "ok"
    assert any(note.startswith("extra-tensor: model.layers.0.mlp.unused") for note in record["notes"])
