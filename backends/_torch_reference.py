"""A reference's distributions in torch: rows kept while it is scored, logits made of them again later.

What is kept, and how: `evalq.engine.reference`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evalq.checkpoint.headers import open_checkpoint
from evalq.engine.backend import Batch
from evalq.engine.columns import REFERENCE
from evalq.engine.reference import (
    DType,
    Packed,
    ReferenceHead,
    StoredWeight,
    pack_float32,
    pack_logits,
    unpack_float32,
    unpack_logits,
)

# Rows of the head that are on the device at once where the whole does not fit.
_STREAMED_ROWS = 16384
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def pack_rows(rows_Rd: Any) -> Packed:
    """What goes into a head, as it is kept: numpy [R, width of a row]."""
    import torch

    rows = rows_Rd.detach().cpu()
    if rows.dtype == torch.float32:
        return pack_float32(rows.numpy())
    bits: Packed = rows.contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits


class RowKeeper:
    """Collects what is kept of a batch while it is scored."""

    def __init__(self, head: ReferenceHead | None) -> None:
        """`head` says what that is."""
        assert head is not None, "asked for without a head"
        self._head = head
        self._logits: list[Packed] = []

    def keep_logits(self, logits_RV: Any) -> None:
        """A chunk of the model's logits, before it is overwritten."""
        if self._head.kind == "logits":
            self._logits.append(pack_logits(logits_RV[:, : self._head.vocab_size].float().cpu().numpy()))

    def rows(self, rows_Rd: Any, shape: tuple[int, int]) -> Packed:
        """What is kept of the batch, [B, R, width of a row]."""
        found = pack_rows(rows_Rd) if self._head.kind == "hidden" else np.concatenate(self._logits)
        return found.reshape(*shape, -1)


def rows_of(reference: "TorchReference | None", batch: Batch) -> Any:
    """The reference's rows of a batch, ready for its logits; None where the batch is not compared."""
    kept = batch.inputs.get(REFERENCE)
    if reference is None or kept is None:
        return None
    return reference.rows(kept.reshape(-1, kept.shape[-1]))


def logits_of(reference: "TorchReference | None", rows_R: Any) -> Callable[[slice], Any] | None:
    """Some of rows_of() -> logits of the reference; None without any."""
    if reference is None or rows_R is None:
        return None
    return lambda part: reference.logits(rows_R[part])


def reference_notes(reference: "TorchReference") -> list[str]:
    """What a reader should know of how the reference was brought in."""
    if not reference.streamed:
        return []
    return ["the reference's head did not fit on the device beside the model: brought there in blocks"]


def find_weight(path: Path, weight_Vd: Any, n_rows: int | None = None) -> StoredWeight | None:
    """Where a checkpoint directory keeps this very matrix, plain; None where it does not.

    Args:
        path: the directory.
        weight_Vd: of the head, as loaded: the stored one in another data type counts as the same.
        n_rows: of the whole matrix, where weight_Vd are its first rows only.
    """
    import torch

    contents = open_checkpoint(path).contents
    shape = (n_rows or len(weight_Vd), weight_Vd.shape[1])
    for tensor in () if contents is None else contents.tensors.values():
        dtype: Any = _STORED.get(tensor.dtype)
        if dtype is None or tuple(tensor.shape) != shape:
            continue
        place = StoredWeight.at(tensor.file, tensor.offset, dtype, shape)
        if all(
            torch.equal(_block(place, rows, weight_Vd.dtype), weight_Vd[rows].cpu())
            for rows in _blocks(len(weight_Vd))
        ):
            return place.with_digest()
    return None


def dtype_name(dtype: Any) -> DType | None:
    """The name of a torch data type that rows can be kept in, else None."""
    name: Any = str(dtype).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else None


def makes_again(head: ReferenceHead, rows_Rd: Any, logits_RV: Any) -> bool:
    """Whether a model's own logits come out of what is kept, tried on some rows.

    No attribute says all that a model does to its logits. Other orders of sums differ by rounding, other
    formulas by far more.

    Args:
        head: how the distributions would be kept.
        rows_Rd: what went into the model's head.
        logits_RV: what came out; the head is tried on the device where they are.
    """
    import torch

    reference = TorchReference(head, logits_RV.device)
    again = reference.logits(reference.rows(pack_rows(rows_Rd))).float()
    same = again.shape == logits_RV.shape
    return same and bool(torch.allclose(again, logits_RV.float(), rtol=1e-2, atol=1e-2))


class TorchReference:
    """A reference's distributions again, on the device of the model that is compared with it."""

    def __init__(self, head: ReferenceHead, device: Any) -> None:
        """Put the head on the device. Where it does not fit, it is brought there in blocks each time.

        Raises:
            ModelError: model_missing, where the head is no longer what it was.
        """
        import torch

        self.head = head
        self.device = torch.device(device)
        self._weight_Vd: Any = None
        if head.weight is None:
            return
        head.weight.require()
        dtype = getattr(torch, head.dtype)
        try:
            self._weight_Vd = torch.empty((head.weight.rows, head.width), dtype=dtype, device=self.device)
            for rows in _blocks(head.weight.rows):
                self._weight_Vd[rows] = _block(head.weight, rows, dtype)
        except torch.OutOfMemoryError:
            self._weight_Vd = None

    @property
    def streamed(self) -> bool:
        """Whether the head is brought to the device in blocks each time."""
        return self.head.weight is not None and self._weight_Vd is None

    def rows(self, packed_R: Packed) -> Any:
        """Kept rows ready for logits(): on the device, but for kept logits, which may not fit there."""
        return self.placed(self.staged(packed_R))

    def staged(self, packed_R: Packed) -> Any:
        """Kept rows in the host's memory, ready for placed()."""
        import torch

        if self.head.kind == "logits":
            return packed_R
        if self.head.dtype == "float32":
            rows = torch.from_numpy(unpack_float32(packed_R))
        else:
            dtype = getattr(torch, self.head.dtype)
            rows = torch.from_numpy(np.ascontiguousarray(packed_R).view(np.int16)).view(dtype)
        # From pinned memory the copy does not wait for what the GPU still has to do.
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def placed(self, staged_R: Any) -> Any:
        """Some of staged() rows, ready for logits()."""
        if self.head.kind == "logits":
            return staged_R
        return staged_R.to(self.device, non_blocking=True)

    def logits(self, rows_Rd: Any) -> Any:
        """Logits of some of rows(), [R, V], in the type that the head gives; a tensor of its own."""
        import torch

        head = self.head
        if head.kind == "logits":
            return torch.from_numpy(unpack_logits(rows_Rd)).to(self.device)
        if self._weight_Vd is not None:
            return self._finished(self._product(rows_Rd, self._weight_Vd))
        assert head.weight is not None
        logits_RV = torch.empty((len(rows_Rd), head.weight.rows), device=self.device)
        for some in _blocks(head.weight.rows):
            weight = _block(head.weight, some, rows_Rd.dtype).to(self.device)
            logits_RV[:, some] = self._finished(self._product(rows_Rd, weight))
        return logits_RV[:, : head.vocab_size]

    def _product(self, rows_Rd: Any, weight_Vd: Any) -> Any:
        """As the reference's engine multiplied: rounded to its data type, or not."""
        import torch

        if self.head.rounded or rows_Rd.dtype == torch.float32:
            return torch.nn.functional.linear(rows_Rd, weight_Vd)
        if rows_Rd.is_cuda:
            return torch.mm(rows_Rd, weight_Vd.T, out_dtype=torch.float32)
        return torch.nn.functional.linear(rows_Rd.float(), weight_Vd.float())

    def _finished(self, logits_RV: Any) -> Any:
        head = self.head
        if head.multiplier != 1.0:
            logits_RV = logits_RV * head.multiplier
        if head.divisor != 1.0:
            logits_RV = logits_RV / head.divisor
        if head.soft_cap is not None:
            logits_RV = (logits_RV / head.soft_cap).tanh() * head.soft_cap
        return logits_RV[:, : head.vocab_size]


def _blocks(n_rows: int) -> list[slice]:
    return [slice(i, min(i + _STREAMED_ROWS, n_rows)) for i in range(0, n_rows, _STREAMED_ROWS)]


def _block(weight: StoredWeight, rows: slice, dtype: Any) -> Any:
    """Rows of a stored matrix in a data type, on the CPU, in memory of their own."""
    import torch

    part = np.array(weight.mapped()[rows])
    if weight.dtype == "bfloat16":
        return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(part).to(dtype)
