"""`"model_dir": [path, {...}]`, as a vLLM form of compare_q writes it, all the way to the record."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Runs

from evalq.engine.registry import Engine, resolve_engine
from evalq.errors import SpecError
from evalq.spec import load_model_specs

ARGUMENTS = {
    "quantization": "compressed-tensors",
    "tensor_parallel_size": 2,
    "max_model_len": 2049,
    "gpu_memory_utilization": 0.80,
    "disable_custom_all_reduce": True,
}


def resolved(tmp_path: Path, arguments: dict[str, Any], **more: Any) -> Engine:
    spec = {"load_fn": "vllm", "fwd_fn": "vllm", "label": "NVFP4", "model_dir": ["/m/NVFP4", arguments]}
    (tmp_path / "m.json").write_text(json.dumps([spec | more]))
    (model,) = load_model_specs(tmp_path / "m.json")
    return resolve_engine(model)


def test_the_nvfp4_example_loads_unchanged(tmp_path: Path) -> None:
    engine = resolved(tmp_path, ARGUMENTS)
    assert engine.options == ARGUMENTS and engine.notes == ()
    assert engine.numeric_options == {"quantization": "compressed-tensors"}


def test_arguments_that_vllm_has_and_evalq_does_not_are_noted(tmp_path: Path) -> None:
    engine = resolved(tmp_path, ARGUMENTS | {"download_dir": "/cache"}, options={"max_model_len": 4096})
    assert engine.options == ARGUMENTS | {"max_model_len": 4096}
    assert engine.notes == ("arguments in model_dir without a meaning for vllm: download_dir",)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (
            {"tensor_parallel_size": "2"},
            {},
            r"models\[0\].model_dir\[1\].tensor_parallel_size: should be int",
        ),
        (
            {},
            {"tensor_paralel_size": 2},
            r"options.tensor_paralel_size: unknown option .did you mean",
        ),
    ],
)
def test_a_wrong_value_is_named_where_it_stands(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        resolved(tmp_path, arguments, options=options)


def test_the_record_says_what_was_left_out(runs: Runs) -> None:
    models = runs.models({"model_dir": [str(runs.tiny), {"seed": 3, "download_dir": "/cache"}]})
    code, (record,) = runs.compare(runs.data(), models, more=("-q",))
    assert code == 0 and record["execution"]["options"] == {"seed": 3}
    assert "arguments in model_dir without a meaning for fake: download_dir" in record["notes"]
