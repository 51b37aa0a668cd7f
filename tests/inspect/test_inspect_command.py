"""`evalq inspect` as a person runs it: text, JSON, picture, exit codes, and what it must never do."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import (
    awq,
    compressed,
    deepseek,
    fp8_block,
    gpt_oss,
    llama,
    llama_config,
    packed_int4,
    small_config,
    write_file,
    write_model,
    write_shards,
)
from matplotlib.figure import Figure

from evalq.checkpoint.headers import open_checkpoint
from evalq.cli import inspect as command
from evalq.errors import EvalqError
from evalq.inspect import inspect_model
from evalq.plots import inspect as chart
from evalq.plots import style

INT4 = {"quantization_config": compressed(4, "pack-quantized")}


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def refused(*arguments: object) -> str:
    with pytest.raises(EvalqError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def llama_int4(tmp_path: Path) -> Path:
    config = llama_config(**INT4)
    return write_model(tmp_path / "llama-int4", llama(config, packed_int4), config)


def test_text(llama_int4, capsys):
    assert run(llama_int4) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:14].strip(): line[14:].strip() for line in lines[:9]}
    assert facts == {
        "model": str(llama_int4),
        "architecture": "LlamaForCausalLM: 32 layers, width 4,096, 32 heads (8 for keys and values), "
        "vocabulary 128,256",
        "format": "compressed-tensors pack-quantized INT4, group 128, symmetric",
        "size": "8.03B parameters, 5.31 GiB, 4.125 bits per weight in the layers",
        "activations": "not quantized",
        "KV cache": "not quantized",
        "context": "131,072 tokens",
        "head": "its own tensor, 16.000 bits per weight",
        "LoRA": "yes, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj "
        "(derived from the modules)",
    }
    rows = [line.split() for line in lines]
    assert [
        "MLP",
        "96",
        "5.64B",
        "4.125",
        "2.71",
        "GiB",
        "51.0%",
        "INT4",
        "group",
        "128",
        "symmetric",
    ] in rows
    assert "not quantized: lm_head" in lines
    assert any(row[:2] == ["exl3", "no"] for row in rows)
    assert lines[-1] == "consistent: files, shapes and declared format agree"


def test_json_agrees_with_the_storage_report(llama_int4, capsys):
    assert run(llama_int4, "--json", "--per-tensor") == 0
    found, storage = json.loads(capsys.readouterr().out), open_checkpoint(llama_int4).storage
    assert (found["layer_bpw"], found["head_bpw"]) == (storage.layer_bpw, storage.head_bpw)
    assert sum(part["bytes"] for part in found["parts"]) == found["disk_bytes"] == storage.disk_bytes
    assert sum(part["weights"] for part in found["parts"]) == found["parameters"]
    assert [tensor["name"] for tensor in found["tensors"]] == [tensor.name for tensor in storage.tensors]
    assert {part["part"] for part in found["parts"]} == {tensor["part"] for tensor in found["tensors"]}
    assert {engine["engine"] for engine in found["engines"]} == {"hf", "vllm", "exl3", "gguf"}
    assert (found["version"], found["findings"], found["lora"]["compatible"]) == (1, [], True)
    run(llama_int4, "--json")
    assert "tensors" not in json.loads(capsys.readouterr().out)


def test_per_tensor(llama_int4, capsys):
    run(llama_int4, "--per-tensor")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    name = "model.layers.31.mlp.down_proj.weight"
    assert [name, "MLP", "58,720,256", "4.125", "30,277,632", "INT4", "group", "128", "symmetric"] in rows


def test_findings_and_exit_codes(tmp_path, capsys):
    config = llama_config(layers=2, **INT4)
    shapes = llama(config, packed_int4)
    del shapes["model.layers.1.mlp.up_proj.weight_scale"]
    assert run(write_model(tmp_path / "broken", shapes, config)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "error missing-scale: model.layers.1.mlp.up_proj.weight_packed has no weight_scale beside it"
    )
    config = llama_config(layers=1) | {"num_hidden_layers": 1}
    path = write_model(tmp_path / "odd", llama(config), config)
    write_file(path / "extra.safetensors", {"a": ("BF16", (4,))})
    assert run(path) == 0  # a warning alone
    assert "warning extra-shard: extra.safetensors lies beside" in capsys.readouterr().out


def test_deep_reads_the_scales(llama_int4, capsys):
    assert run(llama_int4) == 0
    assert run(llama_int4, "--deep") == 1  # a sparse file's scales are zeros
    assert "error scale-zero: model.layers.0.self_attn.q_proj.weight_scale holds 131,072 of" in (
        capsys.readouterr().out
    )


def test_truncated_shard(llama_int4):
    with (llama_int4 / "model.safetensors").open("r+b") as file:
        file.truncate(5_000_000)
    message = refused(llama_int4)
    assert "model.safetensors: truncated: its header describes" in message
    assert "the file has 5,000,000" in message


def test_index_that_names_a_missing_file(tmp_path):
    write_shards(tmp_path, [{f"a{n}.weight": ("BF16", (4, 4))} for n in range(2)])
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert "names model-00001-of-00002.safetensors, which is not there" in refused(tmp_path)


def test_what_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert "nor *.safetensors nor *.gguf in this directory" in refused(tmp_path)
    assert "not a GGUF file" in refused(tmp_path / "notes.txt")
    assert "no such file or directory, and no owner/name of the hub" in refused(tmp_path / "a" / "b")


def test_directory_with_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    message = refused(tmp_path)
    assert "holds GGUF files" in message
    assert f"name the file itself, such as {tmp_path / 'a.gguf'}" in message


def test_hub_name_offline():
    message = refused("someone/model-that-is-not-here", "--offline")
    assert message.startswith("someone/model-that-is-not-here: no such file or directory, not downloaded")


def test_model_larger_than_any_memory(tmp_path, capsys):
    """DeepSeek-V3's shapes: 638 GiB of weights, none of which is on the disk."""
    path = deepseek(tmp_path)
    assert sum(file.stat().st_blocks for file in path.iterdir()) * 512 < 100 * 2**20
    assert run(path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disk_bytes"] > 600 * 2**30
    assert found["layer_bpw"] == pytest.approx(8.002, abs=0.001)
    verdict = next(engine for engine in found["engines"] if engine["engine"] == "hf")
    assert not verdict["runs"]
    assert "GiB in memory" in verdict["reasons"][0]


def test_200_shards(tmp_path, capsys):
    config = small_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    config["num_hidden_layers"] = 200
    tensors = list(llama(config, fp8_block).items())
    path = write_shards(tmp_path, [dict(tensors[n::200]) for n in range(200)], config)
    assert run(path) == 0
    assert "8.002" in capsys.readouterr().out


def test_no_engine_is_imported(llama_int4):
    code = (
        "import argparse, sys; from evalq.cli import inspect as command\n"
        "assert 'rich' not in sys.modules, 'rich'\n"
        "parser = argparse.ArgumentParser(); command.add_arguments(parser)\n"
        f"assert command.run(parser.parse_args([{str(llama_int4)!r}, '--deep'])) == 1\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'vllm', 'compressed_tensors', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def bars(figure: Figure) -> list:
    return [artist for artist in figure.get_children() if artist.get_gid() == chart.COLOR_BAR]


def test_bars_are_as_long_as_the_bytes(llama_int4):
    found = inspect_model(str(llama_int4))
    parts = sorted(found.parts, key=lambda part: -part.bytes)
    drawn = bars(chart.draw(found))
    assert len(drawn) == len(parts)
    for part, bar in zip(parts[:4], drawn, strict=False):
        assert bar.get_width() / drawn[0].get_width() == pytest.approx(part.bytes / parts[0].bytes)
    assert drawn[4].get_width() == chart.THINNEST_PT  # the norms
    colors = [bar.get_facecolor() for bar in drawn]
    assert colors[0] == colors[3]  # MLP and attention are INT4
    assert colors[1] == colors[2] == colors[4] != colors[0]


def test_formats_of_one_kind_follow_one_another(tmp_path):
    config = llama_config(layers=2, **INT4)
    shapes = llama(config, packed_int4)
    for name in ("weight_packed", "weight_scale"):
        del shapes[f"model.layers.0.mlp.up_proj.{name}"]
    shapes["model.layers.0.mlp.up_proj.weight"] = ("BF16", (14336, 4096))
    found = inspect_model(str(write_model(tmp_path, shapes, config)))
    mlp = next(part for part in found.parts if part.part == "MLP")
    rows: dict[float, list] = {}
    for bar in bars(chart.draw(found)):
        rows.setdefault(bar.get_y(), []).append(bar)
    (row,) = [row for row in rows.values() if len(row) == 2]
    assert row[1].get_x() == row[0].get_x() + row[0].get_width()
    assert row[0].get_width() / row[1].get_width() == pytest.approx(mlp.formats[0][1] / mlp.formats[1][1])


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_written_outside_the_page_or_across_another_text(tmp_path, dark):
    for number, path in enumerate((gpt_oss(tmp_path / "moe", 2), deepseek(tmp_path / "deep", 5, 4))):
        figure = chart.draw(inspect_model(str(path)), dark)
        assert figure.get_facecolor()[:3] == pytest.approx(
            tuple(int(style.theme(dark).paper[i : i + 2], 16) / 255 for i in (1, 3, 5))
        )
        figure.draw_without_rendering()
        boxes = [
            t.get_window_extent() for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()
        ]
        assert len(boxes) > 10, number
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert not any(box.shrunk(0.98, 0.9).overlaps(other) for other in boxes[:i])


def test_picture_files(llama_int4, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(llama_int4, "--plot") == 0
    assert (tmp_path / "plots" / "out" / "inspect-llama-int4.png").read_bytes().startswith(b"\x89PNG")
    assert run(llama_int4, "--plot", tmp_path / "bytes.svg", "--dark", "--json") == 0
    captured = capsys.readouterr()
    assert f"picture: {tmp_path / 'bytes.svg'}" in captured.err
    svg = (tmp_path / "bytes.svg").read_text()
    assert "Where the bytes of llama-int4 are" in svg
    assert "MLP" in svg
    assert 'cannot be written as ".bmp"' in refused(llama_int4, "--plot", "a.bmp")


def test_the_embedding_of_a_tied_model_is_its_head(tmp_path, capsys):
    config = small_config(
        tie_word_embeddings=True, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128}
    )
    path = write_model(tmp_path, llama(config, awq, head=None), config)
    assert run(path) == 0
    out = capsys.readouterr().out
    assert "tied to the embedding, 16.000 bits per weight" in out
    assert "embedding, head" in out


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "runs"),
    [("bf16", {"hf"}), ("int4", {"hf"}), ("nvfp4", {"hf"}), ("Q4_0.gguf", {"gguf"})],
)
def test_real_model(smollm2, name, runs, capsys):
    assert run(smollm2(name), "--json", "--deep") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 134_515_008
    assert found["tied_head"] is True
    assert runs <= {engine["engine"] for engine in found["engines"] if engine["runs"]}
