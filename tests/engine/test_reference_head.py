"""What is kept of a reference, and the distributions made of it again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalq.engine import reference
from evalq.engine.reference import NumpyReference, ReferenceHead, StoredWeight
from evalq.errors import ModelError

ROWS, WIDTH, VOCAB = 7, 24, 203


def test_24_bits_of_a_float32_keep_its_size_sign_and_zero() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32) * 10.0 ** np.arange(-4, 4)
    values[0, 0, 0] = 0.0
    packed = reference.pack_float32(values.astype(np.float32))
    assert packed.shape == (3, 5, 24) and packed.dtype == np.uint8
    again = reference.unpack_float32(packed)
    assert again[0, 0, 0] == 0.0
    np.testing.assert_allclose(again, values, rtol=2.0**-16)


def test_numpy_rounds_to_bfloat16_as_torch_does() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32) * 100
    values[:3] = [np.inf, -np.inf, 0.0]
    bits = reference.float32_to_bfloat16(values)
    assert np.array_equal(
        reference.bfloat16_to_float32(bits), torch.from_numpy(values).bfloat16().float().numpy()
    )


def test_16_bit_logits_are_within_half_a_step_whatever_their_range() -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((4, VOCAB)) * [[0.1], [1], [10], [100]]).astype(np.float32)
    logits[3] = 5.0  # all the same
    again = reference.unpack_logits(reference.pack_logits(logits))
    half_step = np.ptp(logits, axis=-1, keepdims=True) / (2**16 - 1) / 2
    assert (np.abs(again - logits) <= half_step + 1e-5).all()
    # Logits of minus infinity come back as the lowest: no row is lost for them.
    logits[0, 3] = -np.inf
    assert np.isfinite(reference.unpack_logits(reference.pack_logits(logits))).all()


def stored(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, StoredWeight]:
    """A head on disk, and where it lies."""
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    file = folder / "model.safetensors"
    save_file({"a": torch.zeros(3), "head": weight}, file)
    header = file.read_bytes()
    start = 8 + int.from_bytes(header[:8], "little")
    offset = start + header[start:].index(weight.view(torch.uint8).numpy().tobytes()[:64])
    name = str(dtype).removeprefix("torch.")
    return weight, StoredWeight.found(file, offset, name, (VOCAB, WIDTH))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", [False, True])
def test_logits_made_again_are_those_of_the_head(tmp_path: Path, dtype: torch.dtype, rounded: bool) -> None:
    weight, place = stored(tmp_path, dtype)
    head = ReferenceHead(
        kind="hidden",
        dtype=place.dtype,
        width=WIDTH,
        vocab_size=VOCAB,
        weight=place,
        rounded=rounded,
        multiplier=0.5,
        soft_cap=7.0,
    )
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = rows.double() @ weight.double().T * 0.5
    exact = (exact / 7).tanh() * 7
    from evalq.backends._torch_reference import TorchReference, pack_rows

    packed = pack_rows(rows)
    assert packed.shape[1:] == (head.row_shape[0],) and packed.dtype == head.row_shape[1]
    # Logits of the head's own type carry its rounding, several times over.
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype] if rounded else 1e-3
    torch_side = TorchReference(head, "cpu")
    for logits in (
        NumpyReference(head).logits(packed),
        torch_side.logits(torch_side.rows(packed)).float().numpy(),
    ):
        assert logits.shape == (ROWS, VOCAB)
        np.testing.assert_allclose(logits, exact.numpy(), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_is_kept_only_where_it_makes_the_models_own_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    from evalq.backends._torch_reference import makes_again

    weight, place = stored(tmp_path, dtype)
    head = ReferenceHead(kind="hidden", dtype=place.dtype, width=WIDTH, vocab_size=VOCAB, weight=place)
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    own = rows.float() @ weight.float().T
    assert makes_again(head, rows, own)
    assert not makes_again(head.model_copy(update={"soft_cap": 5.0}), rows, own)
    assert not makes_again(head, rows, own[:, :-1])


def test_a_head_that_has_changed_or_is_gone_is_told(tmp_path: Path) -> None:
    _, place = stored(tmp_path, torch.float32)
    file = Path(place.file)
    data = bytearray(file.read_bytes())
    data[place.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="its bytes have changed") as caught:
        place.require()
    assert caught.value.category == "model_missing" and "--clear_cache" in str(caught.value.remedy)
    file.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="its bytes have changed"):
        place.require()
    file.unlink()
    with pytest.raises(ModelError, match="No such file"):
        place.require()


def test_what_a_head_computes_is_its_identity_and_not_where_it_lies(tmp_path: Path) -> None:
    _, place = stored(tmp_path, torch.float32)
    head = ReferenceHead(kind="hidden", dtype="float32", width=WIDTH, vocab_size=VOCAB, weight=place)
    moved = head.model_copy(update={"weight": place.model_copy(update={"file": "/elsewhere", "offset": 8})})
    capped = head.model_copy(update={"soft_cap": 30.0})
    assert head.digest == moved.digest != capped.digest
