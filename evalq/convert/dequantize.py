"""Plain weights of a quantized checkpoint."""

from collections.abc import Callable, Iterable
from pathlib import Path

from evalq.checkpoint.headers import Checkpoint, is_gguf, open_checkpoint
from evalq.checkpoint.safetensors import Logical
from evalq.convert.dense import Written, write_dense
from evalq.errors import ModelError


def dequantize(
    source: Path,
    target: Path,
    dtype: str | None = None,
    track: Callable[[Iterable[Logical]], Iterable[Logical]] = iter,
) -> Written:
    """Write a quantized checkpoint's weights as plain numbers.

    Args:
        source: a checkpoint directory of a family named in `evalq.convert.unpack.decode.KNOWN`.
        target: the directory to make.
        dtype: of the weights, bfloat16 when None.
        track: wraps the weights on their way through, to show progress.

    Raises:
        ModelError: unsupported_format (or nothing is quantized), model_corrupt, model_missing.
        SpecError: the target exists.
        StoreError: it cannot be written.
    """
    checkpoint = open_directory(source)
    assert checkpoint.contents is not None
    if all(weight.family is None for weight in checkpoint.contents.logical):
        raise ModelError(
            f"{source} is not quantized", "unsupported_format", "there is nothing to do: use it as it is"
        )
    return write_dense(checkpoint, target, dtype, track=track)


def open_directory(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint directory. Raises ModelError, for a GGUF file too."""
    if not path.exists():
        remedy = "for a model of the hub, first: hf download OWNER/NAME --local-dir DIRECTORY"
        raise ModelError(f"{path}: no such directory", "model_missing", remedy)
    if is_gguf(path):
        raise ModelError(
            f"{path} is a GGUF file",
            "unsupported_format",
            "name the checkpoint directory that it was made from",
        )
    return open_checkpoint(path)
