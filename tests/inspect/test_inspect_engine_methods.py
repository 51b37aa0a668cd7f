"""What an installed engine lists decides, release by release."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import awq, bnb, llama, small_config, write_model

from evalq.inspect.engine_methods import listed_methods, lists

OLD = 'QUANTIZATION_METHODS: dict[str, type] = {"awq": Awq, "bitsandbytes": Bnb}'
NEW = 'from typing import Literal\nQuantizationMethods = Literal["awq", "fp8", "gptq_marlin"]'


def install(folder: Path, version: str, text: str) -> None:
    """Files of a vLLM of this version, as far as they are read."""
    package = folder / "vllm" / "model_executor" / "layers" / "quantization"
    package.mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "__init__.py").write_text(text)
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def verdict(model: Path, site: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "evalq", "inspect", str(model), "--json"],
        env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return next(one for one in json.loads(done.stdout)["engines"] if one["engine"] == "vllm")


@pytest.mark.parametrize(
    ("version", "text", "linear", "method", "reads"),
    [
        ("0.26.0", OLD, bnb, "bitsandbytes", True),
        ("0.32.0", NEW, bnb, "bitsandbytes", False),
        ("0.32.0", NEW, awq, "awq", True),
        ("0.40.0", NEW.replace("awq", "other"), awq, "awq", False),
        ("0.40.0", "something else", bnb, "bitsandbytes", False),
        ("0.40.0", "something else", awq, "awq", True),
        ("0.40.0", "(" * 1000, awq, "awq", True),
    ],
)
def test_vllm_reads_what_its_release_lists(
    tmp_path: Path, version: str, text: str, linear: Any, method: str, reads: bool
) -> None:
    install(tmp_path / "site", version, text)
    config = small_config(quantization_config={"quant_method": method})
    found = verdict(write_model(tmp_path / "m", llama(config, linear), config), tmp_path / "site")
    assert found["version"] == f"vllm {version}"
    refused = [reason for reason in found["reasons"] if reason.startswith("does not read")]
    assert bool(refused) is not reads, found


def test_transformers_of_this_environment():
    methods = listed_methods("hf", None)
    assert methods is not None and {"awq", "gptq", "compressed-tensors", "mxfp4"} <= methods
    assert lists(methods, "bitsandbytes") and not lists(methods, "exl3")
    assert listed_methods("exl3", None) is None
