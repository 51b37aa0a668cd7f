"""What is installed: the wheel's layout, what start-up imports, and what showing stored results imports."""

import subprocess
import sys
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
        "evalq/data/samples/LICENSE.md",
        "evalq/data/samples/chat.jsonl",
        "evalq/data/samples/multilingual.txt",
        "evalq/data/samples/code/ring_buffer.c",
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


def test_stored_models_are_shown_and_drawn_without_an_engine(runs: Runs) -> None:
    data, models = runs.data(), runs.models(*({"options": {"seed": i}} for i in range(5)))
    assert runs.compare(data, models)[0] == 0
    script = (
        "import sys; from evalq.cli.main import compare_main; code = compare_main(sys.argv[1:]); "
        "print(*sys.modules, file=open('modules', 'w')); sys.exit(code)"
    )
    arguments = ["-d", str(data), "-m", str(models), "-o", "c.png"]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.count("(stored)") == 5
    assert Path("c.png").stat().st_size > 10_000
    # What takes long to import; benchmarks/run.py measures the time itself.
    slow = {"torch", "transformers", "llama_cpp", "datasets", "vllm", "matplotlib.pyplot", "scipy", "pandas"}
    assert slow.isdisjoint(Path("modules").read_text().split())
