"""Bit accounting from file headers: no tensor is loaded, no engine imported.

`measure_storage` takes a checkpoint directory (safetensors) or a GGUF file.
"""

from pathlib import Path

from evalq.checkpoint import damage
from evalq.checkpoint.bits import StorageReport, TensorBits

__all__ = ["StorageReport", "TensorBits", "measure_storage"]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def measure_storage(path: Path) -> StorageReport:
    """Measure a model's bits per weight and sizes.

    Args:
        path: a checkpoint directory, or a GGUF file (of a split set NAME-00001-of-0000N.gguf the first part).

    Raises:
        ModelError: model_missing, model_corrupt or unsafe_checkpoint, naming the file and what is wrong.
    """
    # The readers import gguf and json tables that the command line's --help does not need.
    if is_gguf(path):
        from evalq.checkpoint.gguf import measure_gguf

        return measure_gguf(path)
    from evalq.checkpoint.safetensors import measure_directory

    return measure_directory(path)


def is_gguf(path: Path) -> bool:
    """Tell a GGUF file from a checkpoint directory.

    Raises:
        ModelError: if the path is neither: model_missing, or unsafe_checkpoint for a pickle.
    """
    if path.is_dir():
        return False
    if not path.is_file():
        raise damage.missing(path, "no such file or directory")
    if path.suffix in _PICKLE_SUFFIXES:
        raise damage.pickled(path, path.parent, path.name)
    if path.suffix == ".safetensors":
        raise damage.missing(path, "is one file of a checkpoint", f"name its directory, {path.parent}")
    return True
