"""A backend that comes from another package, really built and installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Runs


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
