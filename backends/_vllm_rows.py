"""A reference's rows of one window, read inside vLLM's worker.

In the thread that vLLM's engine runs in: another one would have to wait for Python's lock while the engine
turns log-probabilities into Python's lists, which takes longer than to read.

Axes in names: R targets of a window.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from evalq.engine.reference import Packed, ReferenceHead
from evalq.errors import ModelError


def read_rows(path: Path, n_targets: int, head: ReferenceHead) -> Packed:
    """The rows, [R, width], mapped into memory. Raises ModelError (model_missing)."""
    try:
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice("rows").get_shape())
            made_for = (file.metadata() or {}).get("head", head.digest)
            if shape == (n_targets, head.row_shape[0]) and made_for == head.digest:
                found: Packed = file.get_tensor("rows").numpy()
                return found
            why = f"rows of shape {shape}, or of another head"
    except (OSError, SafetensorError) as error:
        why = str(error)
    raise ModelError(
        f"the reference's rows cannot be read from {path}: {why}",
        "model_missing",
        "run again: the reference is scored again where its rows are missing",
    )
