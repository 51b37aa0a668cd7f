"""A backend that comes from another package, really built and installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import awq, llama, plain, small_config, write_model
from conftest import ROOT, Runs

from evalq.data.tokens import read_stream
from evalq.results.store import Store
from evalq.results.tokens import TokenColumns


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin package, installed by pip."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in (ROOT / "tests" / "plugin_package").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_load_fn_of_another_package(runs: Runs, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    models = runs.models(
        {"load_fn": "coin", "fwd_fn": "coin"}, {"load_fn": "coin", "fwd_fn": None, "options": {"sides": 3}}
    )
    process = runs.process(
        "-d", str(runs.data()), "-m", str(models), "--json", "out.json", env=dict(os.environ)
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    two, three = json.loads((runs.folder / "out.json").read_text())
    assert two["ppl"] == pytest.approx(2) and three["ppl"] == pytest.approx(3)
    assert two["engine_version"] == "evalq-test-plugin 1.2.3"
    assert two["key"] != three["key"]


def test_misspelt_option_of_another_package(
    runs: Runs, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    models = runs.models({"load_fn": "coin", "fwd_fn": None, "options": {"side": 3}})
    process = runs.process("-d", str(runs.data()), "-m", str(models), env=dict(os.environ))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and 'did you mean "sides"' in errors


def test_without_the_package_its_name_is_unknown(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = runs.compare(runs.data(), runs.models({"load_fn": "coin", "fwd_fn": None}))
    assert code == 2 and 'unknown backend "coin"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "runs_here", "why"),
    [(None, True, []), ({"quant_method": "awq"}, False, ["a coin has no AWQ"])],
)
def test_inspect_asks_the_backend_of_another_package(
    tmp_path: Path, installed: Path, settings: Any, runs_here: bool, why: list[str]
) -> None:
    config = small_config() | ({} if settings is None else {"quantization_config": settings})
    model = write_model(tmp_path / "m", llama(config, plain if settings is None else awq), config)
    done = subprocess.run(
        [sys.executable, "-m", "evalq", "inspect", str(model), "--json"],
        env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    coin = json.loads(done.stdout)["engines"][-1]
    assert (coin["engine"], coin["runs"], coin["reasons"]) == ("coin", runs_here, why)
    assert coin["version"] == "evalq-test-plugin 1.2.3"


ASK = """
import sys
from pathlib import Path
from types import SimpleNamespace
from evalq.data.tokens import read_stream
from evalq.results.store import Store
from evalq.run.compare import compare
from evalq.run.process import RunSettings
from evalq.spec import load_data_spec, load_model_specs
quiet = SimpleNamespace(**dict.fromkeys(("status", "model", "event", "record"), lambda *given: None))
settings = RunSettings(columns=tuple(sys.argv[4].split(",")))
data, models, store = map(Path, sys.argv[1:4])
(record,) = compare([load_data_spec(data)], load_model_specs(models), Store(store), settings, quiet)
print(record.model_dump_json())
"""


def test_a_column_of_another_package_lands_in_the_store(
    runs: Runs, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its column is scored and kept without a line about it in evalq, beside what was there before."""
    monkeypatch.setenv("PYTHONPATH", str(installed))
    data = runs.data()
    models = runs.models({"load_fn": "coin", "fwd_fn": "coin"})
    (runs.folder / "ask.py").write_text(ASK)

    def ask(columns: str) -> tuple[dict[str, Any], TokenColumns]:
        command = [
            sys.executable,
            "-P",
            "ask.py",
            str(data),
            str(models),
            str(runs.folder / "store"),
            columns,
        ]
        done = subprocess.run(command, cwd=runs.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["status"] == "ok", record["error"]
        found = Store(runs.folder / "store").result(record["key"]).scores()
        assert found is not None
        return record, found

    first, before = ask("logprob,top1")
    assert set(before.columns) == {"logprob", "top1"}
    record, after = ask("logprob,top1,heads")
    assert record["key"] == first["key"] and record["ppl"] == first["ppl"]
    assert set(after.columns) == {"logprob", "top1", "heads"}
    (tokens,) = (runs.folder / "store" / "tokens").glob("*.safetensors")
    stream = read_stream(tokens)
    assert stream is not None
    heads = after.columns["heads"]
    assert heads.dtype == np.float32 and heads.shape == after.columns["logprob"].shape
    np.testing.assert_array_equal(heads[:255], stream.ids_N[1:256] / 256)
