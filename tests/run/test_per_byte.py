"""--per-byte: models with different tokenizers in one table, each on its own tokens of the text."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tiny
from conftest import Runs

from evalq.data.sources import load_text
from evalq.spec import DataSpec

tokenizers = pytest.importorskip("tokenizers")
UNIFORM = {"mode": "uniform"}


def with_tokenizer(folder: Path, vocabulary: int) -> Path:
    """A checkpoint with a byte-level BPE tokenizer of its own."""
    folder = make_tiny(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    (text,) = load_text(DataSpec(dataset="sample"), Path("texts"), offline=True).documents
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text[:20_000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture
def two(runs: Runs, tmp_path: Path) -> tuple[Path, Path]:
    """A data spec, and three models with two tokenizers: a byte a token, and several."""
    data = runs.data(tokenize_fn=None, protocol="gptq", eval_len=64, eval_stride=None, max_rows=20)
    small, large = with_tokenizer(tmp_path / "small", 256), with_tokenizer(tmp_path / "large", 700)
    models: list[dict[str, Any]] = [
        {"label": "Bytes", "model_dir": str(small), "options": UNIFORM | {"vocab_size": 256}},
        {"label": "Pieces", "model_dir": str(large), "options": UNIFORM | {"vocab_size": 65536}},
        {"label": "Hashed", "model_dir": str(large), "options": {"seed": 1}},
    ]
    return data, runs.models(*models)


def test_each_model_reads_its_own_tokens(
    runs: Runs, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = runs.compare(*two, more=("--per-byte", "--csv", "out.csv", "--markdown", "out.md"))
    assert code == 0
    one, several, hashed = records
    assert one["metrics"]["bits_per_byte"]["value"] == pytest.approx(8), "uniform over 256 bytes"
    assert one["bytes_scored"] == 20 * 63
    assert several["bytes_scored"] > 1.5 * one["bytes_scored"]
    bits = several["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(20 * 63 * 16 / several["bytes_scored"]), "16 bits a token, exactly"
    assert several["metrics"]["byte_ppl"]["value"] == pytest.approx(2**bits)
    assert one["comparison"] == several["comparison"] == hashed["comparison"]
    assert one["comparison"]["unit"] == "byte" and "tokens_sha256" not in one["comparison"]
    against = several["against_reference"]
    assert against["label"] == "Bytes" and "ppl_ratio" not in against
    low, high = (against["metrics"]["bits_per_byte_ln_ratio"][end] for end in ("low", "high"))
    assert low < math.log(bits / 8) < high

    shown = capsys.readouterr().out
    assert "bits/byte" in shown and "PPL" not in shown
    assert (
        "bits per byte of sample, protocol gptq, windows of 64 tokens of each model's own tokenizer" in shown
    )
    assert "| bits per byte |" in Path("out.md").read_text()
    (row, *_) = csv.DictReader(io.StringIO(Path("out.csv").read_text()))
    assert float(row["bits_per_byte"]) == pytest.approx(8) and int(row["bytes_scored"]) == 20 * 63


def test_stored_results_serve_it_and_stay_what_they_are(runs: Runs, two: tuple[Path, Path]) -> None:
    first = runs.compare(*two, more=("--per-byte",))[1]
    stored = {file: file.read_bytes() for file in Path("store").rglob("scores*") if file.is_file()}
    again = runs.compare(*two, more=("--per-byte",))[1]
    assert [r["metrics"] for r in again] == [r["metrics"] for r in first]
    assert {file: file.read_bytes() for file in stored} == stored
    records = [json.loads(file.read_text()) for file in Path("store").rglob("record.json")]
    assert len(records) == 3 and all(record["comparison"]["unit"] == "token" for record in records)


def test_a_stream_of_before_is_read_again_with_its_bytes(runs: Runs, two: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file, save_file

    from evalq.data.tokens import read_stream

    assert runs.compare(*two, more=("--per-byte",))[0] == 0
    for file in Path("store/tokens").glob("*.safetensors"):
        stream = read_stream(file)
        assert stream is not None and stream.bytes_N is not None
        described = {
            "facts": {**vars_of(stream.facts)}, "probe_text": stream.probe_text,
            "probe_ids": stream.probe_ids, "prefix_ids": stream.prefix_ids,
        }  # fmt: skip
        save_file({"ids": load_file(file)["ids"]}, file, {"described": json.dumps(described)})
    code, records = runs.compare(*two, more=("--per-byte",))
    assert code == 0 and records[0]["metrics"]["bits_per_byte"]["value"] == pytest.approx(8)


def vars_of(facts: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(facts)


def test_several_texts(runs: Runs, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from evalq.cli.main import compare_main

    spec = json.loads(two[0].read_text()) | {"dataset": "sample-code"}
    code_spec = runs.write("code.json", spec)
    assert compare_main(["-d", str(two[0]), str(code_spec), "-m", str(two[1]), "--per-byte"]) == 0
    shown = capsys.readouterr().out
    assert "bits per byte of sample-code" in shown and "mean ratio" in shown and "PPL" not in shown
    assert "geometric mean over 2 texts, each alike, of bits per byte" in shown


def test_without_it_the_other_tokenizer_is_refused_and_the_remedy_names_it(
    runs: Runs, two: tuple[Path, Path]
) -> None:
    from evalq.engine.failures import CATEGORIES

    assert "--per-byte" in CATEGORIES["tokenizer_mismatch"].remedy
    records = runs.compare(*two)[1]
    assert len({record["comparison"]["tokens_sha256"] for record in records}) == 1


@pytest.mark.parametrize("flag", [("--kld",), ("--significance",), ("--resolve", "1%"), ("--positions",)])
def test_what_needs_the_same_tokens_is_refused(
    runs: Runs, two: tuple[Path, Path], flag: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.compare(*two, more=("--per-byte", *flag))[0] == 2
    assert f"--per-byte and {flag[0]} exclude each other" in capsys.readouterr().err


def test_one_tokenizer_for_all_is_refused(
    runs: Runs, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.loads(two[0].read_text()) | {"tokenizer_dir": "small"}
    assert runs.compare(runs.write("d.json", spec), two[1], more=("--per-byte",))[0] == 2
    assert '"tokenizer_dir", one for all models' in capsys.readouterr().err


def test_a_tokenizer_that_changes_the_text_fails_alone(
    runs: Runs, two: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "large" / "tokenizer.json"
    described = json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(described))
    code, (one, several, _) = runs.compare(*two, more=("--per-byte",))
    assert code == 1 and one["status"] == "ok" and several["status"] == "failed"
    assert "changes the text before it cuts it" in several["error"]["message"]
    assert several["comparison"] == one["comparison"]


def test_the_chart_names_the_unit(runs: Runs, two: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib")
    code, _ = runs.compare(*two, more=("--per-byte", "-p", "-o", "chart.svg"))
    assert code == 0 and Path("chart.svg").is_file()
