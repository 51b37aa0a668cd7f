"""Scores windows in vLLM beside kept rows, and what float64 makes of the same engine's logits.

    PYTHON tests/support/vllm_columns.py ASKED.json

PYTHON is one with vLLM. ASKED: "model", "options", "columns", "ids" (.npy, [W, T]), "first_target", "head" (a
ReferenceHead), "rows" (.npy, [W, R, width]) or null, "out" (.npz to write), "exact" (work it out in float64
too, in columns exact_*), "give_up" (first begin with all windows, take one and give the others up).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evalq.backends import _vllm_tap
from evalq.backends.vllm import VllmBackend
from evalq.engine.backend import Batch, LoadRequest
from evalq.engine.reference import NumpyReference, ReferenceHead, unpack_float32


class Exactly:
    """Float64 of every piece that a worker reduces, before it is overwritten."""

    def __init__(self, head: ReferenceHead, ids_WT: Any, rows: Any, first_target: int) -> None:
        assert head.weight is not None and head.dtype == "float32"
        self.weight = NumpyReference(head)._block(slice(None)).astype(np.float64)
        self.rows = unpack_float32(rows)
        self.ids, self.first = ids_WT, first_target
        shape = (len(ids_WT), ids_WT.shape[1] - first_target)
        self.found = {name: np.full(shape, np.nan) for name in ("kld", "acceptance", "entropy", "logprob")}
        self.pieces = 0

    def listen(self) -> None:
        reduce = _vllm_tap.Tap._reduce

        def both(tap: Any, piece: Any, logits_nV: Any, overwrite: bool) -> None:
            if piece.window is not None:
                self.pieces += 1
                # Requests are numbered on and on, windows from 0.
                window = int(Path(piece.window.file).stem) % len(self.ids)
                rows = logits_nV[piece.row : piece.row + piece.n_rows]
                self.piece(window, piece.position, rows.double().numpy())
            reduce(tap, piece, logits_nV, overwrite)

        _vllm_tap.Tap._reduce = both  # type: ignore[method-assign]

    def piece(self, window: int, position: int, log_q: Any) -> None:
        for i, row in enumerate(log_q):
            at = position + i + 1 - self.first
            if at < 0:
                continue
            q = row - np.log(np.exp(row).sum())
            p = self.weight @ self.rows[window, at].astype(np.float64)
            p -= p.max()
            p -= np.log(np.exp(p).sum())
            self.found["kld"][window, at] = (np.exp(p) * (p - q)).sum()
            self.found["acceptance"][window, at] = np.minimum(np.exp(p), np.exp(q)).sum()
            self.found["entropy"][window, at] = -(np.exp(q) * q).sum()
            self.found["logprob"][window, at] = q[self.ids[window, self.first + at]]


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    ids_WT, first = np.load(asked["ids"]), asked["first_target"]
    head = None if asked["head"] is None else ReferenceHead.model_validate(asked["head"])
    rows = None if asked["rows"] is None else np.load(asked["rows"])
    columns = tuple(asked["columns"])
    window, targets = ids_WT.shape[1], ids_WT.shape[1] - first
    request = LoadRequest(
        Path(asked["model"]), window, targets, asked["options"], columns=columns, reference=head
    )
    exact = None
    if asked.get("exact"):
        assert head is not None and rows is not None
        exact = Exactly(head, ids_WT, rows, first)
        exact.listen()
    backend = VllmBackend()
    model = backend.load(request)
    batches = [
        Batch(ids_WT[i : i + 1], first, columns, {} if rows is None else {"reference": rows[i : i + 1]})
        for i in range(len(ids_WT))
    ]
    if asked.get("give_up"):
        some = backend.score(model, batches)
        next(some)
        some.close()
    scores = list(backend.score(model, batches))
    found = {name: np.concatenate([one[name] for one in scores]) for name in columns}
    if exact is not None:
        found |= {f"exact_{name}": array for name, array in exact.found.items()}
        found["pieces"] = np.array(exact.pieces)
    if model.reference_head is not None:
        found["head"] = np.array(model.reference_head.model_dump_json())
    found["given"] = np.array(model.columns)
    found["notes"] = np.array(model.notes)
    np.savez(asked["out"], **found)
    backend.close(model)


if __name__ == "__main__":
    main()
