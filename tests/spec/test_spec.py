# ruff: noqa: E501
"""Reading specs: compare_q's files, the shipped ones, paths, labels, schemas."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT

from evalq.data.windows import PROTOCOLS
from evalq.engine.registry import resolve_engine
from evalq.errors import SpecError
from evalq.spec import (
    DataSpec,
    ModelSpec,
    find_specs,
    load_data_spec,
    load_model_specs,
    require_unique_labels,
    resolve_path,
)
from evalq.spec.schema import schemas, text
from evalq.spec.texts import NAMED_TEXTS

SHIPPED_DATA = ["answers.json", *(f"{name}.json" for name in NAMED_TEXTS)]
SHIPPED_MODELS = sorted(
    path.name for path in (ROOT / "specs").glob("*.json") if path.name not in SHIPPED_DATA
)

# As exllamav3's compare_q takes them (its eval/spec folder), paths shortened.
ANCESTOR_MODELS: list[dict[str, Any]] = [
    {
        "model_dir": "/m/hf",
        "load_fn": "transformers_auto",
        "fwd_fn": "transformers",
        "label": "HF FP16",
        "out_logits": "/m/ref",
    },
    {"model_dir": "/m/hf", "load_fn": "transformers_auto_bf16", "fwd_fn": "transformers", "label": "HF BF16"},
    {"model_dir": "/m/bnb-4bit/", "load_fn": "transformers", "fwd_fn": "transformers", "label": "BNB 4-bit"},
    {
        "model_dir": "/m/X.i1-IQ1_M.gguf",
        "load_fn": "llamacpp",
        "fwd_fn": "llamacpp",
        "label": "GGUF IQ1_M imat",
    },
    {
        "model_dir": "/m/a",
        "load_fn": "llamacpp",
        "fwd_fn": "llamacpp",
        "label": "A [light blue]",
        "override_bpw_layer": 4.0,
    },
]
ANCESTOR_DATA = [
    {"tokenize_fn": "transformers", "tokenizer_dir": "/m/hf/", "dataset": "wiki2", "eval_stride": 512, "eval_len": 2048, "max_rows": 20},
    {"tokenize_fn": "transformers", "tokenizer_dir": "/m/hf", "dataset": "wiki2", "eval_stride": 2048, "eval_len": 2048,
     "max_rows": 30, "chat_template": True, "warmup_tokens": 128},
]  # fmt: skip


def test_files_written_for_compare_q_load_unchanged(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(ANCESTOR_MODELS))
    specs = load_model_specs(tmp_path / "m.json")
    engines = [resolve_engine(spec) for spec in specs]
    assert [engine.load for engine in engines] == ["hf", "hf", "hf", "gguf", "gguf"]
    assert [engine.forward for engine in engines] == ["hf", "hf", "hf", "gguf", "gguf"]
    assert engines[1].options == {"dtype": "bfloat16"} and engines[0].options == {}
    assert specs[0].out_logits == "/m/ref" and specs[4].color == "light blue"
    for index, raw in enumerate(ANCESTOR_DATA):
        (tmp_path / f"{index}.json").write_text(json.dumps(raw))
        spec = load_data_spec(tmp_path / f"{index}.json")
        assert (spec.eval_len, spec.eval_stride) == (raw["eval_len"], raw["eval_stride"])
        assert spec.protocol == "exllamav3" and spec.warmup_tokens == raw.get("warmup_tokens", 0)


@pytest.mark.parametrize("name", SHIPPED_DATA)
def test_shipped_data_spec(name: str) -> None:
    spec = load_data_spec(ROOT / "specs" / name)
    assert spec.protocol in PROTOCOLS
    jsonschema.validate(json.loads((ROOT / "specs" / name).read_text()), schemas()["data.schema.json"])


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_shipped_model_spec(name: str) -> None:
    specs = load_model_specs(ROOT / "specs" / name)
    require_unique_labels(specs)
    for spec in specs:
        resolve_engine(spec)
        assert "/" in spec.main_dir and not spec.main_dir.startswith("/")
        assert "Llama-3.1-8B-Instruct" in spec.main_dir, (
            "one family, so that a shootout compares like with like"
        )
    jsonschema.validate(json.loads((ROOT / "specs" / name).read_text()), schemas()["models.schema.json"])


def test_shipped_model_specs_can_be_compared_together() -> None:
    formats = "nvfp4 mxfp4 int4 int8 fp8 awq gptq exl3 gguf bf16"
    assert {f"{name}.json" for name in formats.split()} <= set(SHIPPED_MODELS)
    require_unique_labels([s for name in SHIPPED_MODELS for s in load_model_specs(ROOT / "specs" / name)])


@pytest.mark.parametrize("name", sorted(schemas()))
def test_exported_schema_is_in_step(name: str) -> None:
    assert (ROOT / "specs" / "schema" / name).read_text() == text(schemas()[name]), "run: make schema"


def test_schema_refuses_what_the_loader_refuses() -> None:
    for bad in ({"dataset": "wiki2", "eval_lenn": 5}, {"dataset": "wiki2", "eval_len": "5"}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schemas()["data.schema.json"])


@pytest.mark.parametrize(
    ("label", "plain", "group", "color"),
    [
        ("EXL3 4.0 [purple]", "EXL3 4.0", "EXL3", "purple"),
        ("EXL3 4.0bpw H6 ", "EXL3 4.0bpw H6", "EXL3", None),
        ("One", "One", "One", None),
        ("A [x] b", "A [x] b", "A", None),
        ("INT4 g128 [#ff8800]", "INT4 g128", "INT4", "#ff8800"),
        (None, "model-dir", "model-dir", None),
    ],
)
def test_label(label: str | None, plain: str, group: str, color: str | None) -> None:
    spec = ModelSpec(load_fn="hf", label=label, model_dir="/some/model-dir/")
    assert (spec.plain_label, spec.group, spec.color) == (plain, group, color)


def test_paths_are_relative_to_the_file_and_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", "/w")
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("a/b", tmp_path) == tmp_path / "a/b"
    assert resolve_path("$WEIGHTS/x", tmp_path) == Path("/w/x")
    assert resolve_path("~/x", tmp_path) == Path("/home/me/x")
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "m.json").write_text('{"load_fn": "hf", "model_dir": "../models/x"}')
    (spec,) = load_model_specs(folder / "m.json")
    assert spec.local(spec.main_dir).resolve() == tmp_path / "models" / "x"


def test_single_object_and_overlay_list(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"load_fn": "hf", "model_dir": ["base", "overlay"]}')
    (spec,) = load_model_specs(tmp_path / "m.json")
    assert spec.main_dir == "base" and spec.model_dir == ["base", "overlay"]


def test_wildcards_sort_and_do_not_repeat(tmp_path: Path) -> None:
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text("[]")
    assert [path.name for path in find_specs(["*.json", "a.json"])] == ["a.json", "b.json"]
    with pytest.raises(SpecError, match="no file matches"):
        find_specs(["none-*.json"])
    assert [path.name for path in find_specs(["exl*.json"])] == ["exl3.json"], (
        "shipped, as nothing here matches"
    )


def test_local_file_goes_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "wiki2.json").write_text('{"dataset": "sample"}')
    (path,) = find_specs(["wiki2.json"])
    assert load_data_spec(path).dataset == "sample"


def test_aliases_of_a_dataset() -> None:
    assert DataSpec(dataset="wikitext2").dataset_name == "wiki2"
