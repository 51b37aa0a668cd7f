"""`evalq dequantize`: the weights transformers decompresses, nothing else, and never half of it."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_cases import FLOATS, compress, config, loaded, split, tensors, write_layers

from evalq.checkpoint.headers import open_checkpoint
from evalq.checkpoint.provenance import PROVENANCE_FILE
from evalq.checkpoint.safetensors import read_contents
from evalq.cli import dequantize as dequantize_command
from evalq.convert.dense import write_dense
from evalq.convert.dequantize import dequantize
from evalq.engine.backend import Batch, LoadRequest
from evalq.errors import EvalqError, ModelError, SpecError, StoreError

SCHEMES = (
    "W4A16", "W4A16_ASYM", "W8A16_channel", "W4A16_g32_act", "INT8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4A16",
    "MXFP8A16",
)  # fmt: skip
SMOLLM2_FORMATS = ("int4", "int4-asym", "int8", "fp8", "nvfp4")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    compress(folder, *SCHEMES)
    return folder


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    dequantize_command.add_arguments(parser)
    return dequantize_command.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_what_transformers_decompresses(
    checkpoints: Path, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = checkpoints / scheme, tmp_path / "dense"
    assert run(source, target) == 0
    assert "21 weights, 14 of them dequantized" in capsys.readouterr().err
    found = tensors(target)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert "quantization_config" not in config(target)
    assert config(target) == {k: v for k, v in config(source).items() if k != "quantization_config"}
    expected = {
        name: tensor
        for name, tensor in loaded(source).state_dict().items()
        if name.endswith((".weight",)) and "scale" not in name
    }
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", SMOLLM2_FORMATS)
def test_perplexity_is_that_of_the_packed_model(
    smollm2: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    assert run(smollm2(name), tmp_path / "dense") == 0
    dense, packed = perplexity(tmp_path / "dense"), perplexity(smollm2(name))
    assert dense == pytest.approx(packed, rel=5e-4)
    assert not (tmp_path / "dense" / "model.safetensors.index.json").exists()


def perplexity(path: Path) -> float:
    """Of 128 tokens, on the hf backend, weights alone."""
    from evalq.backends.hf import HfBackend

    engine = HfBackend()
    options = {"threads": 1, "quantize_activations": False}
    model = engine.load(LoadRequest(path, 128, 127, options))
    (scores,) = engine.score(model, [Batch(np.arange(1000, 1000 + 128 * 37, 37)[None], 1)])
    engine.close(model)
    return float(np.exp(-scores["logprob"].mean(dtype=np.float64)))


def test_tokenizer_and_the_rest_go_along(checkpoints: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (checkpoints / "W4A16").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    kept = ["LICENSE", "additional_chat_templates/rag.jinja", "modeling_x.py", "tokenizer.json", "vocab.txt"]
    left = [
        ".git/config",
        "hf_quant_config.json",
        "lora_metadata.json",
        "old.index.json",
        "pytorch_model.bin",
    ]
    for name in kept + left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    for name in ("hf_quant_config.json", "lora_metadata.json"):
        (source / name).write_text("{}")
    (source / "old.index.json").unlink()
    assert run(source, tmp_path / "dense") == 0
    names = [
        p.relative_to(tmp_path / "dense").as_posix() for p in (tmp_path / "dense").rglob("*") if p.is_file()
    ]
    assert sorted(names) == sorted(
        [*kept, "config.json", PROVENANCE_FILE, "generation_config.json", "model.safetensors"]
    )
    assert (tmp_path / "dense" / "vocab.txt").read_text() == "vocab.txt"


def test_shards_in_and_shards_out(checkpoints: Path, tmp_path: Path) -> None:
    source = split(checkpoints / "W4A16_ASYM", tmp_path / "split", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dequantize(checkpoints / "W4A16_ASYM", whole)
    written = write_dense(open_checkpoint(source), parts, shard_bytes=600_000)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max((parts / name).stat().st_size for name in files) < 700_000
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    found, expected = tensors(parts), tensors(whole)
    assert set(index["weight_map"]) == set(found) == set(expected)
    assert index["metadata"]["total_size"] == written.bytes == sum(t.nbytes for t in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_contents(parts).tensors.keys() == found.keys()  # the index is right about every tensor


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_dtype(checkpoints: Path, tmp_path: Path, dtype: str) -> None:
    assert run(checkpoints / "NVFP4", tmp_path / "dense", "--dtype", dtype) == 0
    assert {t.dtype for t in tensors(tmp_path / "dense").values()} == {getattr(torch, dtype)}
    assert config(tmp_path / "dense")["dtype"] == dtype


def test_what_a_model_keeps_in_float32_stays(tmp_path: Path) -> None:
    codes = torch.randn(8, 16).to(torch.float8_e4m3fn)
    layers = {
        "a.weight": codes,
        "a.weight_scale": torch.full((8, 1), 0.5),
        "a.input_scale": torch.ones(1),
        "attn.k_scale": torch.ones(1),
        "norm.weight": torch.ones(16, dtype=torch.float16),
        "router.e_bias": torch.ones(16),
        "mask": torch.ones(4, dtype=torch.bool),
    }
    source = write_layers(tmp_path / "source", layers, text_config={"quantization_config": {}, "x": 1})
    dequantize(source, tmp_path / "dense")
    found = tensors(tmp_path / "dense")
    assert set(found) == {"a.weight", "norm.weight", "router.e_bias", "mask"}
    assert torch.equal(found["a.weight"], (codes.float() * 0.5).to(torch.bfloat16))
    assert [found[n].dtype for n in ("norm.weight", "router.e_bias", "mask")] == [
        torch.bfloat16, torch.float32, torch.bool,
    ]  # fmt: skip
    assert config(tmp_path / "dense")["text_config"] == {"x": 1}


# --- other makers ---


def test_deepseek_blocks_cut_at_the_edge(tmp_path: Path) -> None:
    codes, scale = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    layers = {"a.weight": codes, "a.weight_scale_inv": scale}
    source = write_layers(tmp_path / "source", layers, quantization_config=settings)
    dequantize(source, tmp_path / "dense", "float32")
    expected = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    assert torch.equal(tensors(tmp_path / "dense")["a.weight"], expected)


def test_modelopt_nvfp4_is_compressed_tensors_nvfp4_with_a_scale_that_multiplies(
    checkpoints: Path, tmp_path: Path
) -> None:
    name, layers = "model.layers.0.mlp.up_proj", tensors(checkpoints / "NVFP4")
    modelopt = {
        f"{name}.weight": layers[f"{name}.weight_packed"],
        f"{name}.weight_scale": layers[f"{name}.weight_scale"],
        f"{name}.weight_scale_2": 1 / layers[f"{name}.weight_global_scale"].reshape(()),
        f"{name}.input_scale": torch.tensor(1.0),
    }
    source = write_layers(tmp_path / "source", modelopt, quantization_config={"quant_method": "modelopt"})
    dequantize(source, tmp_path / "dense")
    dequantize(checkpoints / "NVFP4", tmp_path / "theirs")
    found, expected = tensors(tmp_path / "dense"), tensors(tmp_path / "theirs")[f"{name}.weight"]
    assert list(found) == [f"{name}.weight"]
    torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=2**-8, atol=0)


def test_awq(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, group = 64, 24, 32
    q = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zero = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = (torch.rand(inputs // group, outputs, generator=generator) + 0.1).half()
    layers = {"a.qweight": awq_pack(q), "a.qzeros": awq_pack(zero), "a.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    source = write_layers(tmp_path / "source", layers, quantization_config=settings)
    dequantize(source, tmp_path / "dense", "float16")
    spread = [part.repeat_interleave(group, 0) for part in (zero, scales)]
    expected = ((q - spread[0]).half() * spread[1]).T
    assert torch.equal(tensors(tmp_path / "dense")["a.weight"], expected)


def awq_pack(values: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's GEMM layout: 8 outputs to a word, in the order 0 2 4 6 1 3 5 7."""
    words = values.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].long()
    packed = sum(words[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def test_gpt_oss_experts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(120, 130, (2, 6, 3), generator=generator).to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    layers = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 6).bfloat16()}
    source = write_layers(tmp_path / "source", layers, quantization_config={"quant_method": "mxfp4"})
    dequantize(source, tmp_path / "dense")
    found = tensors(tmp_path / "dense")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    exact = (values[codes.long()] * 2.0 ** (scales[..., None].float() - 127)).flatten(-2)
    assert set(found) == {name, f"{name}_bias"}
    assert torch.equal(
        found[name], exact.to(torch.bfloat16).transpose(1, 2)
    )  # transformers keeps [E, in, out]


# --- bad input ---


def refusal(source: Path, target: Path, kind: type[EvalqError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        dequantize(source, target)
    message = str(caught.value)
    assert "\n" not in message
    assert [path.name for path in target.parent.glob("dense*")] == []
    return message


def test_families_that_cannot_be_unpacked_are_named(tmp_path: Path) -> None:
    words = torch.zeros(8, 16, dtype=torch.int32)
    gptq = {"a.qweight": words, "a.scales": torch.ones(2, 16).half(), "a.g_idx": torch.zeros(64).int()}
    exl3 = {"a.trellis": torch.zeros(8, 8, 64).short(), "a.suh": torch.ones(128).half()}
    exl3["a.svh"] = torch.ones(128).half()
    for layers, family in ((gptq, "GPTQ"), (exl3, "EXL3")):
        source = write_layers(tmp_path / family, layers, quantization_config={"bits": 4})
        message = refusal(source, tmp_path / "dense")
        assert (
            f"a.weight is {family}, which cannot be dequantized here (these can: compressed-tensors"
            in message
        )


def test_nothing_to_dequantize(smollm2: Callable[[str], Path], tmp_path: Path) -> None:
    assert "bf16 is not quantized (there is nothing to do" in refusal(smollm2("bf16"), tmp_path / "dense")
    gguf = smollm2("Q8_0.gguf")
    assert "Q8_0.gguf is a GGUF file (name the checkpoint directory" in refusal(gguf, tmp_path / "dense")
    message = refusal(tmp_path / "nowhere", tmp_path / "dense")
    assert "nowhere: no such directory (for a model of the hub, first: hf download" in message


def test_a_packed_weight_without_its_scale(tmp_path: Path, checkpoints: Path) -> None:
    layers = tensors(checkpoints / "W4A16")
    del layers["model.layers.1.mlp.up_proj.weight_scale"]
    message = refusal(write_layers(tmp_path / "source", layers), tmp_path / "dense")
    assert '"model.layers.1.mlp.up_proj.weight_packed" holds I32 codes, and no scale is there' in message


def test_a_group_size_that_does_not_divide(tmp_path: Path, checkpoints: Path) -> None:
    layers, name = tensors(checkpoints / "W4A16"), "model.layers.1.mlp.up_proj.weight_scale"
    layers[name] = layers[name][:, :1].repeat(1, 3)
    source = write_layers(tmp_path / "source", layers)
    message = refusal(source, tmp_path / "dense")
    assert "model.layers.1.mlp.up_proj.weight: groups of 256/3 do not divide 256 input features" in message


def test_a_truncated_shard_and_an_index_that_names_a_missing_file(checkpoints: Path, tmp_path: Path) -> None:
    source = split(checkpoints / "W4A16", tmp_path / "source", 2)
    shard = source / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert "model-00002-of-00002.safetensors: truncated" in refusal(source, tmp_path / "dense")
    shard.unlink()
    assert "names model-00002-of-00002.safetensors, which is not there" in refusal(source, tmp_path / "dense")


def test_a_target_that_exists_or_lies_in_the_source(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SpecError, match="taken exists already"):
        dequantize(checkpoints / "W4A16", tmp_path / "taken")
    with pytest.raises(SpecError, match=r"inside lies inside .*W4A16"):
        dequantize(checkpoints / "W4A16", checkpoints / "W4A16" / "inside")
    assert not list((checkpoints / "W4A16").glob("inside*"))


# --- half-written ---

LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from evalq.convert.dequantize import dequantize
from evalq.errors import StoreError
try:
    dequantize(Path(sys.argv[1]), Path(sys.argv[2]))
except StoreError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_nothing(checkpoints: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(checkpoints / "W4A16"), str(tmp_path / "dense")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.stdout.startswith("cannot write "), run.stderr
    assert "too large" in run.stdout
    assert [path.name for path in tmp_path.glob("dense*")] == []


KILLED = """
import sys, time
from pathlib import Path
from evalq.convert import dense
from evalq.checkpoint.headers import open_checkpoint
source = Path(sys.argv[1])
def slowly(weights):
    for index, weight in enumerate(weights):
        if index == 10:
            print("half", flush=True)
            time.sleep(60)
        yield weight
dense.write_dense(open_checkpoint(source), Path(sys.argv[2]), track=slowly, shard_bytes=100_000)
"""


def test_a_killed_run_never_looks_finished(checkpoints: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkpoints / "W4A16"), str(tmp_path / "dense")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "dense").exists()
    (partial,) = (path for path in tmp_path.glob("dense.partial-*") if path.is_dir())
    assert list(partial.iterdir())  # some shards were there
    assert not list(partial.glob("*.safetensors")) and not (partial / "config.json").exists()
    with pytest.raises(ModelError, match="model.safetensors"):
        read_contents(partial)
    dequantize(checkpoints / "W4A16", tmp_path / "dense")
    assert [path.name for path in tmp_path.glob("dense*")] == ["dense"]
    assert {t.dtype for t in tensors(tmp_path / "dense").values()} < FLOATS


MEASURED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from evalq.convert.dense import write_dense
from evalq.checkpoint.headers import open_checkpoint
source = Path(sys.argv[1])
checkpoint = open_checkpoint(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_dense(checkpoint, Path(sys.argv[2]), shard_bytes=16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_a_shard_and_a_layer(tmp_path: Path) -> None:
    rows, columns, layers = 1024, 1024, 60
    tensors_ = {}
    for index in range(layers):
        tensors_[f"model.layers.{index}.up_proj.weight"] = torch.zeros(
            rows, columns, dtype=torch.float8_e4m3fn
        )
        tensors_[f"model.layers.{index}.up_proj.weight_scale"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    source = write_layers(tmp_path / "source", tensors_)
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "dense")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    assert written > 120 << 20
    assert int(run.stdout) * 1024 < 64 << 20
    with pytest.raises(StoreError, match="cannot write"):
        dequantize(source, Path("/proc/evalq-dense"))
