"""What is installed: the wheel's layout, what start-up imports, and that stored results are quick to show."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Runs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "evalq"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_only_top_level_package_is_evalq(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"evalq"}


def test_wheel_holds_backends_charts_specs_and_texts(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in (
        "evalq/backends/hf.py",
        "evalq/plots/scatter.py",
        "evalq/specs/wiki2.json",
        "evalq/specs/schema/data.schema.json",
        "evalq/data/sample.txt",
        "evalq/data/LICENSE-sample.md",
        "evalq/checkpoint/gguf.py",
        "evalq/py.typed",
    ):
        assert name in names


def test_no_text_of_wikitext_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert b"Robert " + b"Boulter" not in content, name


def test_start_up_imports_no_engine() -> None:
    script = (
        "import sys, evalq.cli.main, evalq.cli.compare, evalq.backends.hf, evalq.backends.gguf; "
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "matplotlib",
        "llama_cpp",
        "datasets",
        "vllm",
        "exllamav3",
        "huggingface_hub",
    }
    assert heavy.isdisjoint(run.stdout.split())


def test_five_stored_models_are_shown_and_drawn_quickly(runs: Runs) -> None:
    data, models = runs.data(), runs.models(*({"options": {"seed": i}} for i in range(5)))
    assert runs.compare(data, models)[0] == 0
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        process = runs.process("-d", str(data), "-m", str(models), "-o", "c.png")
        _, errors = process.communicate(timeout=60)
        seconds.append(time.perf_counter() - start)
        assert process.returncode == 0 and errors.count("(stored)") == 5
    # The target is 3 s on an idle machine; benchmarks/run.py measures it, this keeps it from drifting.
    assert min(seconds) < 4.5
    assert Path("c.png").stat().st_size > 10_000
