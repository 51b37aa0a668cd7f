"""KL divergence through the whole command, beside a plain float64 computation from the models' own logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Runs
from numpy.typing import NDArray

from evalq.data.tokens import read_stream
from evalq.results.store import ResultDir

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
LENGTH, ROWS = 64, 3


def make(folder: Path, kind: str = "LlamaConfig", noise: float = 0.0, vocab: int = 258, **more: Any) -> Path:
    """A random model; with noise, that model with other weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | {"vocab_size": vocab} | more)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
        parameter.data += noise * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def spec(folder: Path, label: str, **more: Any) -> dict[str, Any]:
    options = {"dtype": "float32", "threads": 1}
    return {
        "load_fn": "hf",
        "fwd_fn": "hf",
        "label": label,
        "model_dir": str(folder),
        "options": options,
    } | more


def data(runs: Runs, **more: Any) -> Path:
    return runs.data(protocol="gptq", eval_len=LENGTH, eval_stride=None, max_rows=ROWS, **more)


def logprobs(folder: Path, runs: Runs) -> NDArray[np.float64]:
    """ln P of every token of the vocabulary at every scored position, float64 [n, V]."""
    import torch
    import transformers

    stream = read_stream(next((runs.folder / "store/tokens").glob("*.safetensors")))
    assert stream is not None
    ids = torch.from_numpy(stream.ids_N[: ROWS * LENGTH].reshape(ROWS, LENGTH))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1].double()
    found: NDArray[np.float64] = logits.log_softmax(-1).flatten(0, 1).numpy()
    return found


def columns(runs: Runs, record: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """A model's columns, those beside the reference by their plain names."""
    found = ResultDir(runs.folder / "store/results" / record["key"]).scores()
    assert found is not None
    return {name.split("@")[0]: column for name, column in found.columns.items()}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("LlamaConfig", {}), ("Gemma2Config", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8})],
)
def test_every_column_is_that_of_a_plain_computation(
    runs: Runs, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    one, other = make(tmp_path / "one", kind, **more), make(tmp_path / "other", kind, 0.02, **more)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    code, (first, second) = runs.compare(data(runs), models, more=("--kld",))
    assert code == 0
    p, q = logprobs(one, runs), logprobs(other, runs)
    mine, theirs = columns(runs, second), columns(runs, first)
    exact = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(mine["kld"], exact, atol=2e-6, rtol=1e-3)
    assert abs(mine["kld"].mean(dtype=np.float64) - exact.mean()) <= 1e-6 + 1e-3 * exact.mean()
    np.testing.assert_allclose(mine["acceptance"], np.minimum(np.exp(p), np.exp(q)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(mine["reference_logprob"], theirs["logprob"], atol=1e-4)
    for found, exact_ln in ((mine, q), (theirs, p)):
        assert np.array_equal(found["argmax"], exact_ln.argmax(-1))
        np.testing.assert_allclose(found["max_prob"], np.exp(exact_ln.max(-1)), rtol=1e-4)
        np.testing.assert_allclose(found["entropy"], -(np.exp(exact_ln) * exact_ln).sum(-1), atol=1e-4)
    against = second["against_reference"]["metrics"]
    assert against["kld"]["value"] == pytest.approx(exact.mean(), rel=1e-3)
    assert against["same_top"]["value"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_a_model_with_more_columns_is_compared_on_the_shared_ones(runs: Runs, tmp_path: Path) -> None:
    one, wide = make(tmp_path / "one"), make(tmp_path / "wide", vocab=320)
    models = runs.models(spec(one, "reference", reference=True), spec(wide, "wide"))
    code, (_, second) = runs.compare(data(runs), models, more=("--kld",))
    assert code == 0
    p, q = logprobs(one, runs), logprobs(wide, runs)
    q = q[:, :258] - np.log(np.exp(q[:, :258]).sum(-1, keepdims=True))
    np.testing.assert_allclose(columns(runs, second)["kld"], (np.exp(p) * (p - q)).sum(-1), rtol=1e-3)


def test_the_reference_beside_itself_is_zero_and_noise_is_not(runs: Runs, tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    models = runs.models(spec(one, "reference", reference=True), spec(one, "twin", revision="x"))
    code, (_, twin, noisy) = runs.compare(data(runs), models, more=("--noise-floor",))
    assert code == 0 and noisy["label"] == "reference noise floor"
    # Rows are kept with 24 bits of 32.
    assert abs(twin["against_reference"]["metrics"]["kld"]["value"]) < 1e-8
    assert 1e-7 < noisy["against_reference"]["metrics"]["kld"]["value"] < 1e-2
    assert any("1 + 0.00195312 * normal" in note for note in noisy["notes"])
    again = runs.compare(data(runs), models, more=("--noise-floor", "-cc"))[1][2]
    assert again["ppl"] == noisy["ppl"]  # the noise of a window is always the same


def test_rows_that_are_gone_are_made_again_and_nothing_else(runs: Runs, tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", noise=0.02)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    _, before = runs.compare(data(runs), models, more=("--kld",))
    kept = runs.folder / "store/references"
    lost = next(kept.glob("*/64-*"))
    whole = lost.read_bytes()
    lost.write_bytes(whole[:-10])
    times = {file.name: file.stat().st_mtime_ns for file in kept.glob("*/*.safetensors")}
    code, after = runs.compare(data(runs), models, more=("--kld",))
    assert code == 0 and lost.read_bytes() == whole
    changed = [
        file.name for file in kept.glob("*/*.safetensors") if file.stat().st_mtime_ns != times[file.name]
    ]
    assert changed == [lost.name]
    assert [record["ppl"] for record in after] == [record["ppl"] for record in before]


def test_a_stored_comparison_gets_the_divergence_without_other_numbers_changing(
    runs: Runs, tmp_path: Path
) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", noise=0.02)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    _, plain = runs.compare(data(runs), models)
    code, with_kld = runs.compare(data(runs), models, more=("--kld",))
    assert code == 0
    assert [record["key"] for record in plain] == [record["key"] for record in with_kld]
    assert [record["ppl"] for record in plain] == [record["ppl"] for record in with_kld]
    assert "kld" not in plain[1]["against_reference"]["metrics"]
    assert with_kld[1]["against_reference"]["metrics"]["kld"]["value"] > 0


def test_a_reference_that_fails_leaves_the_others_their_perplexity(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"label": "reference", "reference": True, "options": {"misbehave": "oom-load"}}
    code, (first, second) = runs.compare(
        runs.data(), runs.models(broken, {"label": "model"}), more=("--kld",)
    )
    assert code == 1 and first["status"] == "failed" and second["status"] == "ok"
    assert 'no KL divergence: the reference "reference" was not scored' in capsys.readouterr().err


def test_an_engine_that_shows_no_distributions_is_no_reference_and_says_so(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    models = runs.models(
        {"label": "reference", "reference": True}, {"label": "model", "options": {"seed": 1}}
    )
    code, records = runs.compare(runs.data(), models, more=("--kld",))
    assert code == 0 and all(record["status"] == "ok" for record in records)
    assert any("does not show what its distributions" in note for note in records[0]["notes"])
    assert "no KL divergence against it" in capsys.readouterr().err
    # That is known from then on: nothing is started for it again.
    assert runs.compare(runs.data(), models, more=("--kld",))[0] == 0
    assert capsys.readouterr().err.count("(stored)") == 2


def test_a_reference_over_the_limit_is_scored_and_not_kept(runs: Runs, tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", noise=0.02)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    code, (first, second) = runs.compare(data(runs), models, more=("--kld", "--reference-max-gb", "0.000001"))
    assert code == 0 and any("allowed are 0.0 GB" in note for note in first["notes"])
    assert "kld" not in second["against_reference"]["metrics"]
    assert not list((runs.folder / "store/references").glob("*/*.safetensors"))


def test_a_full_disk_while_the_reference_is_written_ends_in_one_line(runs: Runs, tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: a window's rows take 24 kB, all else less than 20."""
    import resource

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    one, other = (make(tmp_path / str(n), noise=n, hidden_size=64) for n in (0.0, 0.02))
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    first, more = (runs.data(f"{n}.json", protocol="gptq", eval_len=128, max_rows=n) for n in (1, 3))
    assert runs.compare(first, models, more=("--kld",))[0] == 0
    folder = runs.folder / "store/references"
    before = {file: file.read_bytes() for file in folder.glob("*/*")}
    process = runs.process("-d", str(more), "-m", str(models), "--kld", preexec_fn=full)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    (line,) = (line for line in errors.splitlines() if "cannot write" in line)
    assert "references" in line and "free some space" in line and "Traceback" not in errors
    after = {file: file.read_bytes() for file in folder.glob("*/*")}
    assert after == before, "nothing half written, nothing lost"
    code, (_, model) = runs.compare(more, models, more=("--kld",))
    assert code == 0 and model["against_reference"]["metrics"]["kld"]["value"] > 0
    assert all(file.read_bytes() == was for file, was in before.items())


def test_speed_is_that_of_scoring_without_kl_divergence(runs: Runs, tmp_path: Path) -> None:
    one, other, third = (make(tmp_path / str(n), noise=n) for n in (0.0, 0.01, 0.02))
    both = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    _, plain = runs.compare(data(runs), both)
    assert all(record["tokens_per_second"] > 0 for record in plain)
    every = runs.models(spec(one, "reference", reference=True), spec(other, "model"), spec(third, "new"))
    code, with_kld = runs.compare(data(runs), every, more=("--kld",))
    assert code == 0
    assert [record["tokens_per_second"] for record in with_kld[:2]] == [r["tokens_per_second"] for r in plain]
    new = with_kld[2]
    assert new["tokens_per_second"] is None and new["execution"]["seconds"] is None
    assert new["peak_memory_gib"] > 0 and new["notes"] == with_kld[1]["notes"]


def test_a_head_that_moved_away_ends_nothing(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", noise=0.02)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    runs.compare(data(runs), runs.models(spec(one, "reference", reference=True)), more=("--kld",))
    runs.compare(data(runs), models, more=("--kld",))
    head = next((runs.folder / "store/references").glob("*/head.json"))
    described = json.loads(head.read_text())
    described["weight"]["file"] = str(tmp_path / "gone.safetensors")
    head.write_text(json.dumps(described))
    third = make(tmp_path / "third", noise=0.01)
    more = runs.models(spec(one, "reference", reference=True), spec(third, "third"), name="more.json")
    code, records = runs.compare(data(runs), more, more=("--kld",))
    assert code == 0 and records[1]["status"] == "ok"
    assert "is gone" in capsys.readouterr().err


def test_the_reference_is_kept_for_every_text_and_loaded_once(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalq.run import turn

    real, jobs = turn.run_worker, []

    def run_worker(job: Any, *rest: Any) -> None:
        jobs.append(job)
        real(job, *rest)

    monkeypatch.setattr(turn, "run_worker", run_worker)
    one, other = make(tmp_path / "one"), make(tmp_path / "other", noise=0.02)
    models = runs.models(spec(one, "reference", reference=True), spec(other, "model"))
    short = runs.data("short.json", protocol="gptq", eval_len=LENGTH // 2, eval_stride=None, max_rows=ROWS)
    code, records = runs.compare([data(runs), short], models, more=("--kld",))
    assert code == 0 and [len(job.texts) for job in jobs] == [2, 2]
    found = [record["against_reference"]["metrics"]["kld"]["value"] for record in records[2:]]
    alone = [
        runs.compare(text, models, more=("--kld", "--store", str(tmp_path / "alone")))[1][1]
        for text in (data(runs), short)
    ]
    assert found == [record["against_reference"]["metrics"]["kld"]["value"] for record in alone]
    (mean,) = (m for m in runs.means if m["label"] == "model")
    assert mean["kld"]["value"] == pytest.approx(sum(found) / 2)
