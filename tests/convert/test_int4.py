"""Packed weights of single layers: bit for bit what compressed-tensors makes of them, and its cache."""

import os
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

from evalq.convert.unpack import packed as packed_module
from evalq.errors import ModelError
from evalq.int4 import (
    WeightCache,
    unpack_int4_weights,
    unpack_mxfp4_weights,
    unpack_nvfp4_weights,
)

Layer = dict[str, torch.Tensor]


def compressed(
    rows: int,
    columns: int,
    container: str,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **args: object,
) -> tuple[Layer, torch.Tensor]:
    """The tensors of a layer as compressed-tensors packs it, and what it unpacks from them."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    grouped = weight.float().unflatten(-1, (-1, args.get("group_size") or columns))
    state: Layer = {"weight": weight}
    if container.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1).float()
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
    state |= {"weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(container)
    layer = compressor.compress(state, scheme)
    return layer, compressor.decompress(dict(layer), scheme)["weight"]


def integers(bits: int = 4, group: int | None = None, symmetric: bool = True) -> dict[str, object]:
    strategy = "group" if group else "channel"
    return {"num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": symmetric}


def unpacked(layer: Layer, **more: object) -> torch.Tensor:
    zero_point = layer.get("weight_zero_point")
    return unpack_int4_weights(
        layer["weight_packed"], layer["weight_scale"], layer["weight_shape"], zero_point, **more
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(64, 256, 128), (48, 96, 32), (7, 33, 11), (5, 33, None), (1, 8, None), (130, 70, None), (9, 30, 10)],
)
def test_integers_come_out_bit_for_bit(
    rows: int, columns: int, group: int | None, bits: int, symmetric: bool
) -> None:
    layer, expected = compressed(rows, columns, "pack-quantized", **integers(bits, group, symmetric))
    assert ("weight_zero_point" in layer) is not symmetric
    found = unpacked(layer, num_bits=bits, group_size=group)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    # Without a group size the shapes tell.
    assert torch.equal(unpacked(layer, num_bits=bits), expected)


def test_the_layout_by_hand() -> None:
    codes = torch.tensor([[-8, 7, 0, 1, -1, 3, 2, -5, 4, 6]])
    words = [sum((int(q) + 8) << 4 * i for i, q in enumerate(part)) for part in codes[0].split(8)]
    packed = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in words]], dtype=torch.int32)
    scale = torch.tensor([[0.5, 2.0]])
    expected = torch.tensor([[-4.0, 3.5, 0.0, 0.5, -0.5, 6.0, 4.0, -10.0, 8.0, 12.0]])
    assert torch.equal(unpack_int4_weights(packed, scale, (1, 10)), expected)
    zero_point = torch.tensor([[8 + 1, 8 - 3]], dtype=torch.int32)  # +1 and -3, one row
    moved = expected - torch.tensor([0.5 * 1] * 5 + [2.0 * -3] * 5)
    assert torch.equal(unpack_int4_weights(packed, scale, (1, 10), zero_point, group_size=5), moved)


def test_the_result_has_the_dtype_asked_for() -> None:
    layer, expected = compressed(16, 64, "pack-quantized", **integers(group=32))
    assert unpacked(layer, dtype=torch.float32).dtype == torch.float32
    assert torch.equal(unpacked(layer, dtype=torch.float16), expected.to(torch.float16))


def test_groups_in_activation_order() -> None:
    layer, in_order = compressed(8, 64, "pack-quantized", **integers(group=16))
    # Column c belongs to group g_idx[c]: shuffling codes and g_idx alike shuffles the weights.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    codes = packed_module.unpack_from_int32(layer["weight_packed"], 4, torch.Size((8, 64)))
    shuffled = dict(layer, weight_packed=_pack(codes[:, order]))
    g_idx = (torch.arange(64) // 16)[order].to(torch.int32)
    assert torch.equal(unpacked(shuffled, g_idx=g_idx), in_order[:, order])


def _pack(codes: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(codes.contiguous(), 4)


def test_activation_order_is_refused_where_the_library_dropped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = compressed(8, 64, "pack-quantized", **integers(group=16))
    known = packed_module.dequantize

    def newer(x_q, scale, zero_point=None, args=None, dtype=None, global_scale=None):  # as of 0.19
        return known(x_q, scale, zero_point, args, dtype, global_scale=global_scale)

    monkeypatch.setattr(packed_module, "dequantize", newer)
    assert unpacked(layer).shape == (8, 64)
    with pytest.raises(ModelError, match=r"weight_g_idx .* cannot apply it .*compressed-tensors<0\.19"):
        unpacked(layer, g_idx=torch.zeros(64, dtype=torch.int32))


def fp4(group: int, strategy: str) -> dict[str, object]:
    return {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": group}


def test_nvfp4_comes_out_bit_for_bit() -> None:
    layer, expected = compressed(24, 80, "nvfp4-pack-quantized", **fp4(16, "tensor_group"))
    parts = (layer["weight_packed"], layer["weight_scale"], layer["weight_global_scale"])
    found = unpack_nvfp4_weights(*parts)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    exact = unpack_nvfp4_weights(*parts, dtype=torch.float32)
    assert torch.equal(exact.to(torch.bfloat16), expected)
    assert not torch.equal(exact, expected.float())


def test_mxfp4_comes_out_bit_for_bit() -> None:
    weights = torch.tensor(
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    )
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).repeat(2)[None]  # one row of 32
    for exponent in (120, 127, 130):
        scale = torch.tensor([[exponent]], dtype=torch.uint8)
        expected = (weights.repeat(2) * 2.0 ** (exponent - 127)).to(torch.bfloat16)
        assert torch.equal(unpack_mxfp4_weights(packed, scale)[0], expected)


LAYER, _ = compressed(16, 64, "pack-quantized", **integers(group=32, symmetric=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": LAYER["weight_packed"].to(torch.uint8)}, r"weight_packed is uint8 .* should be int32"),
        ({"packed": LAYER["weight_packed"][:, :7]}, r"weight_packed is int32 \[16, 7\], .* \[16, 8\]"),
        ({"packed": None}, r"weight_packed is missing"),
        ({"scale": None}, r"weight_scale is missing: should be floating-point numbers"),
        ({"scale": LAYER["weight_scale"].int()}, r"weight_scale is int32 .* floating-point"),
        ({"scale": LAYER["weight_scale"][:8]}, r"weight_scale is bfloat16 \[8, 2\], .* \[16, groups\]"),
        ({"shape": (16, 63)}, r"groups of .* do not divide 63 input features"),
        ({"shape": (16, 64, 1)}, r"weight_shape is \[16, 64, 1\]"),
        ({"group_size": 48}, r"groups of 48 do not divide 64 input features"),
        ({"group_size": 16}, r"weight_scale is bfloat16 \[16, 2\], should be \[16, 4\] for groups of 16"),
        ({"zero_point": LAYER["weight_zero_point"].to(torch.int8)}, r"weight_zero_point is int8"),
        ({"zero_point": LAYER["weight_zero_point"][:1]}, r"weight_zero_point is int32 \[1, 2\], .* \[2, 2\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"weight_g_idx is int32 \[63\], should be \[64\]"),
        ({"num_bits": 3}, r"integers of 3 bits: .* depends on the version"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    arguments = {
        "packed": LAYER["weight_packed"],
        "scale": LAYER["weight_scale"],
        "shape": (16, 64),
        "zero_point": LAYER["weight_zero_point"],
    }
    with pytest.raises(ModelError, match=message) as caught:
        unpack_int4_weights(**arguments | changes)
    assert "\n" not in str(caught.value)


def test_an_fp4_tensor_that_does_not_fit_is_named() -> None:
    packed, scale = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 2).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"weight_global_scale is missing"):
        unpack_nvfp4_weights(packed, scale, None)
    with pytest.raises(ModelError, match=r"weight_scale is float32 \[4, 2\], should be float8_e4m3fn"):
        unpack_nvfp4_weights(packed, scale.float(), torch.ones(1))
    with pytest.raises(ModelError, match=r"weight_scale is bfloat16 \[4, 2\], should be \[4, 1\]"):
        unpack_mxfp4_weights(packed, torch.full((4, 2), 127, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"weight_packed is int32 \[4, 16\], should be uint8"):
        unpack_mxfp4_weights(packed.int(), torch.full((4, 1), 127, dtype=torch.uint8))


# --- the cache ---

NAME = "model.layers.0.mlp.up_proj.weight"


def write_layers(path: Path, seed: int, layers: int = 1) -> list[torch.Tensor]:
    """A file with packed layers; what they unpack to."""
    tensors, expected = {}, []
    for index in range(layers):
        layer, weight = compressed(16, 64, "pack-quantized", seed + index, **integers(group=32))
        tensors |= {f"model.layers.{index}.mlp.up_proj.{name}": tensor for name, tensor in layer.items()}
        expected.append(weight)
    save_file(tensors, path)
    return expected


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_weight_is_unpacked_once(file: Path) -> None:
    (expected,) = write_layers(file, 0)
    cache = WeightCache(1 << 20)
    first = cache.weight(file, NAME)
    assert torch.equal(first, expected)
    assert cache.weight(file, NAME) is first
    assert cache.weight(file, NAME, dtype=torch.float32).dtype == torch.float32
    assert cache.bytes == 16 * 64 * (2 + 4)
    cache.clear()
    assert cache.bytes == 0
    assert cache.weight(file, NAME) is not first


def test_the_least_recently_used_weights_are_dropped(file: Path) -> None:
    write_layers(file, 0, layers=3)
    names = [NAME.replace(".0.", f".{index}.") for index in range(3)]
    cache = WeightCache(2 * 16 * 64 * 2)
    a, b = (cache.weight(file, name) for name in names[:2])
    assert cache.weight(file, names[0]) is a
    cache.weight(file, names[2])
    assert cache.bytes == cache.max_bytes
    assert cache.weight(file, names[0]) is a
    assert cache.weight(file, names[1]) is not b


def test_a_weight_larger_than_the_cache_is_returned(file: Path) -> None:
    (expected,) = write_layers(file, 0)
    cache = WeightCache(100)
    assert torch.equal(cache.weight(file, NAME), expected)
    assert cache.bytes == 0


def test_a_replaced_file_is_read_again(file: Path, tmp_path: Path) -> None:
    write_layers(file, 0)
    cache = WeightCache(1 << 20)
    old, times = cache.weight(file, NAME), file.stat()
    (expected,) = write_layers(tmp_path / "new", 1)
    os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` would
    os.replace(tmp_path / "new", file)
    assert file.stat().st_size == times.st_size
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    new = cache.weight(file, NAME)
    assert torch.equal(new, expected)
    assert not torch.equal(new, old)


def test_a_file_overwritten_in_place_is_read_again(file: Path) -> None:
    cache = WeightCache(1 << 20)
    for seed in range(20):  # without a pause: within one tick of the clock too
        (expected,) = write_layers(file.with_suffix(".new"), seed)
        with file.open("r+b" if file.exists() else "wb") as opened:
            opened.write(file.with_suffix(".new").read_bytes())
        assert torch.equal(cache.weight(file, NAME), expected)


def test_threads_see_only_whole_files(file: Path, tmp_path: Path) -> None:
    versions = [write_layers(tmp_path / f"{seed}", seed)[0] for seed in range(2)]
    contents = [(tmp_path / f"{seed}").read_bytes() for seed in range(2)]
    file.write_bytes(contents[0])
    cache = WeightCache(3 * 16 * 64 * 2)
    stop, wrong, seen = threading.Event(), [], [0, 0]

    def read() -> None:
        while not stop.is_set():
            found = cache.weight(file, NAME)
            matches = [torch.equal(found, version) for version in versions]
            seen[matches.index(True) if True in matches else 0] += 1
            if True not in matches:
                wrong.append(found)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        (tmp_path / "next").write_bytes(contents[turn % 2])
        os.replace(tmp_path / "next", file)
        time.sleep(0.005 if turn % 10 else 0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(seen) > 0
    assert torch.equal(cache.weight(file, NAME), versions[1])
    assert cache.bytes <= cache.max_bytes


def test_threads_read_a_file_that_is_overwritten_in_place(file: Path, tmp_path: Path) -> None:
    versions = [write_layers(tmp_path / f"{seed}", seed)[0] for seed in range(2)]
    contents = [(tmp_path / f"{seed}").read_bytes() for seed in range(2)]
    file.write_bytes(contents[0])
    cache, stop, wrong, read_whole = WeightCache(1 << 20), threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                found = cache.weight(file, NAME)
            except ModelError as error:
                assert "keeps changing" in str(error)
                continue
            is_whole = any(torch.equal(found, version) for version in versions)
            (read_whole if is_whole else wrong).append(found)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(40):
        # One call to write(2): readers of a small file see all of it or nothing.
        descriptor = os.open(file, os.O_WRONLY)
        os.write(descriptor, contents[turn % 2])
        os.close(descriptor)
        time.sleep(0.005 if turn % 5 else 0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert read_whole
    assert torch.equal(cache.weight(file, NAME), versions[1])


def test_what_is_wrong_with_a_file_is_said(file: Path) -> None:
    cache = WeightCache(1 << 20)
    with pytest.raises(ModelError, match="No such file"):
        cache.weight(file, NAME)
    write_layers(file, 0)
    with pytest.raises(ModelError, match='holds no weight "model.layers.7.weight"'):
        cache.weight(file, "model.layers.7.weight")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated"):
        cache.weight(file, NAME)
