"""What several test modules share: a tiny checkpoint, a store, the real small model, the real text."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tiny
from filelock import FileLock

from evalq.cli.main import compare_main

# huggingface_hub reads it once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("EVALQ_TEST_MODELS", ROOT / "models" / "smollm2")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real engines run one after the other: two of them on all cores at once are many times slower."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.xdist_group("engine"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's store, specs or evalq.toml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVALQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("EVALQ_CONFIG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint directory that headers can be read from; only the fake backend can score it."""
    return make_tiny(tmp_path / "tiny")


class Runs:
    """Writes specs into the test's folder and runs the real command on them."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny = folder, tiny
        self.means: list[dict[str, Any]] = []

    def data(self, name: str = "data.json", **changes: Any) -> Path:
        spec = {
            "dataset": "sample",
            "tokenize_fn": "fake",
            "eval_len": 256,
            "eval_stride": 128,
            "max_rows": 6,
        }
        return self.write(name, {k: v for k, v in (spec | changes).items() if v is not None})

    def models(self, *models: dict[str, Any], name: str = "models.json") -> Path:
        base = {"load_fn": "fake", "fwd_fn": "fake", "model_dir": str(self.tiny)}
        return self.write(name, [base | {"label": f"Fake {i}"} | model for i, model in enumerate(models)])

    def write(self, name: str, value: Any) -> Path:
        path = self.folder / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def compare(
        self, data: Path | Sequence[Path], *models: Path, more: tuple[str, ...] = ()
    ) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and records (none when the run ended before there were any)."""
        texts = [data] if isinstance(data, Path) else data
        out = self.folder / "records.json"
        out.unlink(missing_ok=True)
        code = compare_main(["-d", *map(str, texts), "-m", *map(str, models), "--json", str(out), *more])
        found = json.loads(out.read_text()) if out.is_file() else []
        if isinstance(found, dict):  # of several texts
            self.means = found["means"]
            return code, found["records"]
        return code, found

    def process(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """The command in a process of its own, to be killed or interrupted."""
        command = [sys.executable, str(ROOT / "compare.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, **pipes | more)


@pytest.fixture
def runs(tmp_path: Path, tiny: Path) -> Runs:
    return Runs(tmp_path, tiny)


@pytest.fixture(scope="session")
def smollm2() -> Callable[[str], Path]:
    """Path of one of the checkpoints that demo/build.py makes of SmolLM2-135M-Instruct, made if need be."""

    def get(name: str) -> Path:
        MODELS.mkdir(parents=True, exist_ok=True)
        with FileLock(MODELS / ".lock"):
            if not (MODELS / name).exists():
                build = [
                    sys.executable,
                    str(ROOT / "demo" / "build.py"),
                    "--models",
                    str(MODELS),
                    "--only",
                    name,
                ]
                subprocess.run(build, check=True)
        return MODELS / name

    return get


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Callable[[str], Path]) -> Path:
    return smollm2("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def wikitext2() -> Path:
    """The original wiki.test.raw, which does not ship with evalq."""
    named = os.environ.get("EVALQ_WIKITEXT2")
    if not named:
        pytest.skip("EVALQ_WIKITEXT2 does not name the original wiki.test.raw")
    return Path(named)
