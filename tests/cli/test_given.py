"""A comparison without spec files: texts, folders, GGUF files and hub names on the command line."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs, make_tiny

from evalq.cli.given import data_spec, model_specs
from evalq.cli.main import compare_main
from evalq.errors import SpecError
from evalq.spec import load_data_spec, shipped_specs


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + bytes(20))
    return path


def named(*names: object, engine: str | None = "fake") -> list[tuple[str, str]]:
    specs = model_specs([str(name) for name in names], engine, offline=True)
    return [(spec.plain_label, spec.main_dir) for spec in specs]


def test_a_text_has_the_settings_of_the_shipped_spec(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("once upon a time")
    shipped = load_data_spec(shipped_specs() / "wiki2.json")
    spec = data_spec("book.txt")
    assert (spec.dataset, spec.local(spec.path or "")) == ("text", path)
    assert (spec.protocol, spec.eval_len, spec.eval_stride, spec.max_rows) == (
        shipped.protocol,
        shipped.eval_len,
        shipped.eval_stride,
        shipped.max_rows,
    )


def test_wikitext2_is_known_by_its_bytes(wikitext2: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "test split.txt"
    renamed.symlink_to(wikitext2)
    assert data_spec(str(renamed)).dataset == "wiki2"
    (tmp_path / "wiki.test.raw").write_text("another text")
    assert data_spec("wiki.test.raw").dataset == "text"


@pytest.mark.parametrize("name", ["text", "text/", "../{folder}/text"])
def test_the_only_text_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.raw").write_text("words")
    (tmp_path / "text" / "README.md").write_text("about it")
    spec = data_spec(name.format(folder=tmp_path.name))
    assert spec.local(spec.path or "").resolve() == tmp_path / "text" / "a.raw"


def test_a_data_spec_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "data").write_text('{"dataset": "sample", "eval_len": 64}')
    assert data_spec("data").eval_len == 64
    assert data_spec("sample").dataset == data_spec("sample.json").dataset == "sample"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.txt", "none.txt: no such file"),
        ("tiny", "a model's folder, not a text .name models with -m"),
        ("a.gguf", "a model, not a text .name models with -m"),
        ("tiny/model.safetensors", "a model, not a text"),
        ("two", "holds 2 texts .name one text file"),
        ("empty", "holds no text"),
        ("model.json", "a model spec where a data spec is expected .name model specs with -m"),
        ("models.json", "a data spec is one JSON object .name model specs with -m"),
        ("b\udce9.txt", "the name is not UTF-8"),
    ],
)
def test_what_is_no_data(tiny: Path, tmp_path: Path, name: str, says: str) -> None:
    gguf(tmp_path / "a.gguf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for text in ("a.txt", "b.raw"):
        (tmp_path / "two" / text).write_text("words")
    (tmp_path / "model.json").write_text('{"load_fn": "hf", "model_dir": "x"}')
    (tmp_path / "models.json").write_text('[{"load_fn": "hf", "model_dir": "x"}]')
    with pytest.raises(SpecError, match=says):
        data_spec(name)


def test_models_are_called_by_their_names(tiny: Path, tmp_path: Path) -> None:
    path = gguf(tmp_path / "ggufs" / "Model.Q4_K_M.gguf")
    assert named("tiny/", path, "owner/Name-exl3@4.0bpw", "owner/N-GGUF/n-Q8_0.gguf") == [
        ("tiny", str(tiny)),
        ("Model.Q4_K_M", str(path)),
        ("Name-exl3 4.0bpw", "owner/Name-exl3"),
        ("n-Q8_0", "owner/N-GGUF/n-Q8_0.gguf"),
    ]
    (spec,) = model_specs(["owner/Name-exl3@4.0bpw"], "fake", True)
    assert (spec.revision, spec.load_fn, spec.where) == ("4.0bpw", "fake", "-m owner/Name-exl3@4.0bpw")
    assert named("ggufs") == named(path)


def test_the_current_folder_has_a_name(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    assert named(".") == named("model.safetensors") == [("tiny", str(tiny))]


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    names = ("b.Q8_0.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-b.gguf", "imatrix.gguf")
    for name in names:
        gguf(tmp_path / "ggufs" / name)
    expected = [("a", str(tmp_path / "ggufs" / names[1])), ("b.Q8_0", str(tmp_path / "ggufs" / names[0]))]
    assert named("ggufs") == expected
    assert named("ggufs/*of*.gguf") == expected[:1]
    assert named("ggufs/a-00002-of-00002.gguf") == expected[:1], "the first part, whichever is named"


def test_a_folder_of_checkpoints(tmp_path: Path) -> None:
    for name in ("3.0bpw", "2.0bpw"):
        make_tiny(tmp_path / "exl3" / name)
    assert [label for label, _ in named("exl3/")] == ["exl3 2.0bpw", "exl3 3.0bpw"]
    assert [label for label, _ in named("exl3/*")] == ["2.0bpw", "3.0bpw"]


def test_a_model_named_twice_counts_once(tiny: Path, runs: Runs) -> None:
    assert named("tiny", "tiny/", tiny, "ti*") == [("tiny", str(tiny))]
    models = runs.models({}, {})
    assert len(named(models, str(models), "models*.json")) == 2


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/hf", "b/hf"):
        make_tiny(tmp_path / name)
    assert [label for label, _ in named("a/hf", "b/hf")] == ["hf (a/hf)", "hf (b/hf)"]


def test_what_is_here_goes_before_what_ships_and_the_hub(tmp_path: Path) -> None:
    assert {spec.main_dir.split("/")[0] for spec in model_specs(["bf16"], None, True)} != {str(tmp_path)}
    make_tiny(tmp_path / "bf16")
    make_tiny(tmp_path / "owner" / "name")
    assert [where for _, where in named("bf16", "owner/name")] == [
        str(tmp_path / "bf16"),
        str(tmp_path / "owner" / "name"),
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.json", "none.json: no such file .shipped specs"),
        ("specs/none.json", "no such file"),
        ("a/b/c/d", "no such file"),
        ("book.txt", "no model spec .JSON., no GGUF file and no model's folder .name the text"),
        ("data.json", "a data spec where model specs are expected .name data specs with -d"),
        ("adapter", 'is a LoRA adapter .name it in a model spec: "lora"'),
        ("tokenizer", "holds a tokenizer and no model"),
        ("texts", "holds a text and no model .name the text to score on with -d"),
        ("empty", "holds no config.json and no GGUF file"),
        ("owner/name@" + "x" * 300, "revision: string should have at most 255 characters"),
        ("*.none", "no file matches"),
        ("b\udce9.gguf", "the name is not UTF-8"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, says: str) -> None:
    holds = {"adapter": "adapter_config.json", "tokenizer": "tokenizer.json", "texts": "a.txt"}
    for folder, file in holds.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.txt").write_text("once upon a time")
    (tmp_path / "data.json").write_text('{"dataset": "sample"}')
    with pytest.raises(SpecError, match=says):
        named(name)


def test_the_engine_follows_from_the_files(tiny: Path, tmp_path: Path) -> None:
    gguf(tmp_path / "broken.gguf")
    specs = model_specs(["tiny", "broken.gguf", "owner/name-exl3", "owner/name"], None, offline=True)
    assert [spec.load_fn for spec in specs] == ["hf", "gguf", "exl3", "hf"]
    specs = model_specs(["tiny"], "vllm", offline=True)
    assert specs[0].load_fn == "vllm"


def test_a_comparison_without_model_specs(tiny: Path, runs: Runs, tmp_path: Path) -> None:
    make_tiny(tmp_path / "other", seed=1)
    out = tmp_path / "records.json"
    arguments = ["-d", str(runs.data()), "-m", "tiny/", "other", "--engine", "fake", "--json", str(out), "-q"]
    assert compare_main(arguments) == 0
    records: list[dict[str, Any]] = json.loads(out.read_text())
    assert [record["label"] for record in records] == ["tiny", "other"]
    assert {record["engine"] for record in records} == {"fake"}


def test_an_unknown_engine_is_said_at_once(
    tiny: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_main(["-d", str(runs.data()), "-m", "tiny", "--engine", "fke", "-q"]) == 2
    assert '-m tiny.load_fn: unknown backend "fke" (did you mean "fake"?' in capsys.readouterr().err


@pytest.mark.engine
def test_a_text_a_folder_and_a_gguf_file(
    smollm2: Callable[[str], Path], smollm2_gguf: Path, tmp_path: Path
) -> None:
    sample = resources.files("evalq.data") / "sample.txt"
    (tmp_path / "story.txt").write_text(sample.read_text())
    folder, out = smollm2("bf16"), tmp_path / "records.json"
    names = [str(folder), str(smollm2_gguf)]
    assert compare_main(["-d", "story.txt", "-m", *names, "--max-rows", "1", "--json", str(out), "-q"]) == 0
    records = json.loads(out.read_text())
    assert [record["engine"] for record in records] == ["hf", "gguf"]
    assert records[0]["ppl"] < records[1]["ppl"]
