"""transformers with the packages of other quantizers: bitsandbytes, and gptqmodel for GPTQ and AWQ.

Each quantized model is compared with one of plain weights that stands for the same function. gptqmodel pins
another numpy than evalq's own environment has, so it lives in one that `make engine-gptq` makes.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_one
from conftest import ROOT, Runs
from numpy.typing import NDArray
from other_int4 import CONFIGS, GROUP, layer
from safetensors.numpy import load_file

from evalq.backends.hf import HfBackend
from evalq.engine.backend import LoadRequest

HF = HfBackend()
GPTQ_PYTHON = Path(os.environ.get("EVALQ_TEST_GPTQ_PYTHON", ROOT / ".venv-gptq" / "bin" / "python"))
# Kernels multiply in 16 bits and INT8 rounds activations; codes read in a wrong way are nats off.
KERNEL_NATS = 0.1
# The vocabulary is that of the fake tokenizer.
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def tiny_model(dtype: Any) -> Any:
    """A random Llama whose predictions are far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model.to(dtype)


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers that quantizers change, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def logprob(folder: Path) -> NDArray[np.float32]:
    """Log-probabilities of 4 x 49 tokens, as the backend gives them on a CPU in float32."""
    model = HF.load(LoadRequest(folder, 50, 49, {"dtype": "float32", "device": "cpu"}))
    ids = np.random.default_rng(1).integers(0, TINY["vocab_size"], (4, 50))
    scores = score_one(HF, model, ids)["logprob"]
    HF.close(model)
    return scores


needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason='pip install "evalq[bnb]"'
)


@needs_bitsandbytes
@pytest.mark.engine
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "int8"])
def test_bitsandbytes_is_the_model_of_its_dequantized_weights(tmp_path: Path, kind: str) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = {"bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind.endswith("nested")}
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else None
    config = config or BitsAndBytesConfig(load_in_4bit=True, **four_bit)
    plain = tiny_model(torch.float32)
    plain.save_pretrained(tmp_path / "original")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized.save_pretrained(tmp_path / "quantized")
    layers = linear_layers(quantized)
    assert len(layers) == 14
    for name, module in layers.items():
        weight = module.weight
        if kind == "int8":
            values = weight.CB.float() * weight.SCB[:, None] / 127
        else:
            values = dequantize_4bit(weight.data, weight.quant_state)
        plain.get_submodule(name).weight.data = values.float()
    plain.save_pretrained(tmp_path / "dequantized")

    found, same, before = (logprob(tmp_path / name) for name in ("quantized", "dequantized", "original"))
    assert np.median(np.abs(found - same)) < KERNEL_NATS
    assert np.median(np.abs(found - before)) > (0.02 if kind == "int8" else 0.5), "quantized indeed"


def write_int4(kind: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of random codes in the layout of GPTQ or AWQ, and the same as plain weights."""
    import torch
    from safetensors.torch import save_file

    plain = tiny_model(torch.float16)
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in linear_layers(plain).items():
        rows, columns = module.weight.shape
        codes = torch.randint(0, 16, (rows, columns), generator=random)
        # AutoGPTQ's kernels of symmetric weights take 8 for zero; AWQ's read what is stored.
        low, high = (8, 9) if kind == "gptq" else (6, 11)
        zeros = torch.randint(low, high, (rows, columns // GROUP), generator=random)
        scales = (0.02 + 0.03 * torch.rand(zeros.shape, generator=random)).half()
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer(kind, codes, zeros, scales).items()}
        values = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
        module.weight.data = values.half()
    plain.save_pretrained(folder / "plain")
    quantized = {f"{name}.weight" for name in linear_layers(plain)}
    tensors |= {name: tensor for name, tensor in plain.state_dict().items() if name not in quantized}
    packed = folder / kind
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
    return packed, folder / "plain"


@pytest.mark.engine
@pytest.mark.skipif(not GPTQ_PYTHON.is_file(), reason=f"{GPTQ_PYTHON} is missing: make engine-gptq")
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_are_the_model_of_their_codes(runs: Runs, kind: str) -> None:
    packed, plain = write_int4(kind, runs.folder)
    common = {"load_fn": "hf", "fwd_fn": "hf"}
    models = runs.models(
        {"label": kind, "model_dir": str(packed), "python": str(GPTQ_PYTHON), **common},
        {"label": "plain", "model_dir": str(plain), **common},
    )
    code, records = runs.compare(runs.data(eval_len=128, eval_stride=128, max_rows=4), models)
    assert code == 0, [record["error"] for record in records]
    assert records[0]["format"] == f"{kind.upper()} INT4 group 64"
    first, second = (
        load_file(runs.folder / "store" / "results" / record["key"] / "scores.safetensors")["logprob"]
        for record in records
    )
    assert np.std(second) > 1, "a model that prefers some tokens"
    assert np.median(np.abs(first - second)) < KERNEL_NATS
