"""`evalq plan` on files: what a person sees, and every bad input with its one line."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_benchmark import measured

from evalq.checkpoint.shape import read_shape
from evalq.cli import plan as plan_command
from evalq.errors import EvalqError, ModelError, SpecError
from evalq.vllm_memory.gpus import GPUS, gpu_named


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    return plan_command.run(parser.parse_args(arguments))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Llama-3.1-8B's header and config, and 15 GiB of hole."""
    return measured.write_checkpoint("Llama-3.1-8B-Instruct", tmp_path / "llama")


def test_a_plan_reads_like_a_bill(llama, capsys):
    assert run(str(llama), "--gpu", "H100", "--max-len", "16000", "--vllm", "0.11") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "GPU 79.18" in out
    assert "- weights 14.99 exact: 14.96 in the files + 0.03 RoPE tables" in out
    assert "- peak activation 4.53 4.77 5.05 estimate: 16,384 tokens at once, 1,024 sequences" in out
    assert "131,072 bytes per token (16 bits)" in out
    assert "fits: 14.99 GiB of weights" in out
    assert "CUDA graphs" not in out
    assert "longest sequence: 131,072 tokens" in out
    assert "it fits as BF16 (14.99 GiB), FP8 or INT8" in out


def test_one_that_does_not_fit_says_what_would(llama, capsys):
    assert run(str(llama), "--gpu-memory", "15.6") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "does not load: 14.99 GiB of weights per GPU" in out
    assert "smallest tensor parallel that fits: --tp 4" in out


def test_json_and_nothing_else(llama, capsys):
    assert run(str(llama), "--gpu", "H100", "--activation", "2.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["peak_activation_gib"] == {"low": 2.5, "expected": 2.5, "high": 2.5}
    assert found["advice"]["smallest_tp"] == 1


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4", "int4-asym", "nvfp4"])
def test_real_checkpoints(smollm2: Callable[[str], Path], name, capsys):
    folder = smollm2(name)
    assert run(str(folder), "--gpu", "L4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    size = (folder / "model.safetensors").stat().st_size / 2**30
    assert found["weights_parts_gib"]["files"] == pytest.approx(size, rel=0.02)
    assert found["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 2
    formats = {f["name"]: f["weights_gib"] for f in found["advice"]["formats"]}
    # 106 million weights in linear layers whatever they are stored in.
    assert formats["BF16"] == pytest.approx(0.2516, abs=0.002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H1000"], 'unknown GPU "H1000" (one of H200, H100, A100-80GB'),
        ([], "name the GPU with --gpu or its memory with --gpu-memory GIB"),
        (
            ["--gpu", "H100", "--tp", "3"],
            "--tp 3 does not divide the 32 heads (8 of keys) of llama (one of 1, 2, 4, 8, 16, 32)",
        ),
        (["--gpu", "H100", "--pp", "33"], "--pp 33 is more than the 32 layers of llama"),
        (["--gpu", "H100", "--max-len", "131073"], "131073 is more than the 131072 positions of llama"),
        (["--gpu", "H100", "--lora-rank", "600"], "vLLM has slots up to 512"),
    ],
)
def test_bad_settings(llama, arguments, message):
    with pytest.raises(SpecError) as found:
        run(str(llama), *arguments)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_config_without_a_field(llama, field):
    config = json.loads((llama / "config.json").read_text())
    del config[field]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=f"its config.json lacks {field}"):
        run(str(llama), "--gpu", "H100")


def test_a_config_without_most_fields_names_them_all(llama):
    (llama / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SpecError, match="num_hidden_layers, hidden_size, num_attention_heads, vocab_size"):
        run(str(llama), "--gpu", "H100")


def test_no_config_and_no_length(llama):
    config = json.loads((llama / "config.json").read_text())
    del config["max_position_embeddings"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="does not say how long a text may be .add --max-len"):
        run(str(llama), "--gpu", "H100")
    (llama / "config.json").unlink()
    with pytest.raises(SpecError, match="has no config.json"):
        run(str(llama), "--gpu", "H100")


def test_other_engines_files(tmp_path, llama):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(SpecError, match="is a GGUF file: llama.cpp .*plan the original safetensors"):
        run(str(gguf), "--gpu", "H100")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3"}}))
    with pytest.raises(SpecError, match="is an EXL3 checkpoint: exllamav3 runs it, not vLLM"):
        run(str(llama), "--gpu", "H100")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError) as found:
        read_shape(str(tmp_path / "nothing"))
    assert found.value.category == "model_missing"


def test_a_hub_name_without_a_hub():
    with pytest.raises(EvalqError) as found:
        read_shape("some/model")
    assert str(found.value).startswith("some/model: no such file or directory, not downloaded from the hub")


def test_gpus_by_any_spelling():
    assert gpu_named("NVIDIA H100") == gpu_named("h100")
    assert gpu_named("rtx_4090").name == gpu_named("4090").name == "RTX-4090"
    assert gpu_named("A100").total_gib == 79.15
    assert gpu_named("a100 40gb").total_gib == 39.49
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert not gpu_named("A100").has_large_defaults
    assert gpu_named("H100").has_large_defaults


def test_help_does_not_import_the_planner():
    import subprocess
    import sys

    code = (
        "import sys, argparse; from evalq.cli import plan as c; "
        "c.add_arguments(argparse.ArgumentParser()); "
        "heavy = ('rich', 'evalq.checkpoint', 'huggingface_hub'); "
        "print(sorted(m for m in sys.modules if m.startswith(heavy)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_original_stays_as_it_was(llama, tmp_path):
    before = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in llama.iterdir())
    run(str(llama), "--gpu", "H100", "--json")
    assert before == sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in llama.iterdir())
    shutil.rmtree(llama)


def test_a_gpu_as_the_driver_names_it():
    from evalq.vllm_memory.gpus import DRIVER_GIB, gpu_named, gpu_reported

    assert gpu_reported("NVIDIA H100 80GB HBM3", 79.65) == gpu_named("H100")
    assert gpu_reported("NVIDIA H200", 140.4) == gpu_named("H200")
    assert gpu_reported("NVIDIA A100-SXM4-40GB", 40.0) == gpu_named("A100-40GB")
    unknown = gpu_reported("NVIDIA RTX 2000 Ada", 16.0)
    assert unknown.total_gib == 16.0 - DRIVER_GIB
