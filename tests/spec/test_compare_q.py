"""Spec files that were written for exllamav3's compare_q, and for the forms of it that know vLLM."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import Runs, make_tiny

from evalq.data.sources import settings_of
from evalq.errors import SpecError
from evalq.spec import ModelSpec, load_data_spec, load_model_specs, require_unique_labels, tell_apart
from evalq.spec.schema import schemas

# As a vLLM form of compare_q writes its NVFP4 example: keyword arguments of vLLM's LLM class.
ARGUMENTS: dict[str, Any] = {
    "quantization": "compressed-tensors",
    "tensor_parallel_size": 2,
    "max_model_len": 2049,
    "gpu_memory_utilization": 0.80,
    "disable_custom_all_reduce": True,
}
NVFP4 = {"load_fn": "vllm", "fwd_fn": "vllm", "label": "vLLM NVFP4", "model_dir": ["/m/NVFP4", ARGUMENTS]}
KNOWN = (*ARGUMENTS, "dtype", "enforce_eager")


def load(tmp_path: Path, *models: dict[str, Any]) -> list[ModelSpec]:
    jsonschema.validate(list(models), schemas()["models.schema.json"])
    (tmp_path / "m.json").write_text(json.dumps(models))
    return load_model_specs(tmp_path / "m.json")


def test_arguments_of_vllm_become_options(tmp_path: Path) -> None:
    (spec,) = load(tmp_path, NVFP4)
    assert (spec.model_dir, spec.main_dir, spec.plain_label) == ("/m/NVFP4", "/m/NVFP4", "vLLM NVFP4")
    chosen = spec.options_for(KNOWN)
    assert chosen.options == ARGUMENTS and not chosen.notes
    assert chosen.where["max_model_len"].endswith("m.json: models[0].model_dir[1].max_model_len")


def test_what_has_no_meaning_is_noted(tmp_path: Path) -> None:
    more = {"download_dir": "/cache", "max_logprobs": 20, "dtype": None}
    (spec,) = load(tmp_path, NVFP4 | {"model_dir": ["/m/NVFP4", ARGUMENTS | more]})
    chosen = spec.options_for(KNOWN)
    assert chosen.options == ARGUMENTS
    assert chosen.notes == ("arguments in model_dir without a meaning for vllm: download_dir, max_logprobs",)


def test_the_specs_own_options_go_first(tmp_path: Path) -> None:
    (spec,) = load(tmp_path, NVFP4 | {"options": {"max_model_len": 4096, "dtyp": "auto"}})
    chosen = spec.options_for(KNOWN)
    assert chosen.options == ARGUMENTS | {"max_model_len": 4096, "dtyp": "auto"}
    assert chosen.where["dtyp"].endswith("models[0].options.dtyp"), "a mistake, not a foreign argument"


def test_what_a_spec_has_a_key_for_goes_there(tmp_path: Path) -> None:
    arguments = ARGUMENTS | {"trust_remote_code": True, "revision": "main"}
    (spec,) = load(tmp_path, NVFP4 | {"model_dir": ["o/n", arguments]})
    assert spec.trust_remote_code and spec.revision == "main"
    assert spec.options_for(KNOWN).options == ARGUMENTS and not spec.options_for(KNOWN).notes
    (spec,) = load(tmp_path, NVFP4 | {"model_dir": ["o/n", arguments], "trust_remote_code": False})
    assert not spec.trust_remote_code


@pytest.mark.parametrize(
    "model_dir", [["a", {}, "b"], [{"tensor_parallel_size": 2}, "a"], ["a", 5], ["a", None], ["", {}], []]
)
def test_other_lists_are_refused(tmp_path: Path, model_dir: list[Any]) -> None:
    (tmp_path / "m.json").write_text(json.dumps([NVFP4 | {"model_dir": model_dir}]))
    with pytest.raises(SpecError, match=r"models\[0\].model_dir: "):
        load_model_specs(tmp_path / "m.json")


def test_null_is_the_default(tmp_path: Path) -> None:
    keys = "max_rows chat_template warmup_tokens protocol tokenize_fn tokenizer_dir eval_stride bos"
    plain = {"dataset": "wiki2", "eval_len": 2048}
    jsonschema.validate(plain | dict.fromkeys(keys.split()), schemas()["data.schema.json"])
    (tmp_path / "nulls.json").write_text(json.dumps(plain | dict.fromkeys(keys.split())))
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    assert load_data_spec(tmp_path / "nulls.json") == load_data_spec(tmp_path / "plain.json")
    keys = "options trust_remote_code label fwd_fn override_bpw_layer lora revision reference"
    (model,) = load(tmp_path, {"load_fn": "hf", "model_dir": "x"} | dict.fromkeys(keys.split()))
    assert model.model_dump() == ModelSpec(load_fn="hf", model_dir="x").model_dump()


@pytest.mark.parametrize("key", ["dataset", "load_fn", "model_dir"])
def test_null_where_there_is_no_default(tmp_path: Path, key: str) -> None:
    is_data = key == "dataset"
    raw = {"dataset": "wiki2"} if is_data else {"load_fn": "hf", "model_dir": "x"}
    (tmp_path / "s.json").write_text(json.dumps(raw | {key: None}))
    with pytest.raises(SpecError, match=f"{key}: input should be"):
        (load_data_spec if is_data else load_model_specs)(tmp_path / "s.json")


@pytest.mark.parametrize("rows", [0, -1, None])
def test_all_rows(tmp_path: Path, rows: int | None) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"dataset": "sample", "max_rows": rows}))
    assert settings_of(load_data_spec(tmp_path / "d.json")).max_rows is None


def test_keys_for_compare_qs_chart(tmp_path: Path) -> None:
    raw = {
        "dataset": "wiki2",
        "dataset_display_name": "wikitext2",
        "display_rows": 20,
        "display_eval_len": 1920,
    }
    (tmp_path / "d.json").write_text(json.dumps(raw))
    assert load_data_spec(tmp_path / "d.json").dataset_display_name == "wikitext2"


def labelled(*models: tuple[str, str], **more: Any) -> list[ModelSpec]:
    specs = [ModelSpec(load_fn="hf", label=label, model_dir=path, **more) for label, path in models]
    return tell_apart(specs)


def test_a_label_used_twice_is_told_apart_by_folder() -> None:
    specs = labelled(("EXL3 4.0 [purple]", "/m/a/4.0"), ("HF", "/m/hf"), ("EXL3 4.0 [purple]", "/m/b/4.0/"))
    assert [spec.plain_label for spec in specs] == ["EXL3 4.0 (a/4.0)", "HF", "EXL3 4.0 (b/4.0)"]
    assert [spec.color for spec in specs] == ["purple", None, "purple"]
    assert [spec.group for spec in specs] == ["EXL3", "HF", "EXL3"]
    note = 'another model has the label "EXL3 4.0" too: told apart by a/4.0'
    assert specs[0].notes == (note,) and specs[1].notes == ()


def test_what_else_tells_models_apart() -> None:
    base = ModelSpec(load_fn="hf", label="A", model_dir="o/n")
    for changes, labels in (
        ({"revision": "r2"}, ["A (default)", "A (r2)"]),
        ({"load_fn": "vllm"}, ["A (hf)", "A (vllm)"]),
        ({"options": {"threads": 2}}, ["A", "A"]),
    ):
        specs = tell_apart([base, base.model_copy(update=changes)])
        assert [spec.plain_label for spec in specs] == labels
    with pytest.raises(SpecError, match='"A" is also the label of'):
        require_unique_labels(specs)


def test_three_folders_two_of_one_name() -> None:
    specs = labelled(("A", "x/m"), ("A", "y/m"), ("A", "m"))
    assert [spec.plain_label for spec in specs] == ["A (x/m)", "A (y/m)", "A (m)"]
    require_unique_labels(specs)


def test_a_comparison_of_two_models_with_one_label(runs: Runs, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", seed=1)
    models = runs.models({"label": "A"}, {"label": "A", "model_dir": str(other)})
    code, records = runs.compare(runs.data(), models, more=("-q",))
    assert code == 0
    assert [record["label"] for record in records] == ["A (tiny)", "A (other)"]
