"""Columns beside vLLM's own log-probabilities: asked of its workers, fetched, matched by request.

What the workers do: `evalq.backends._vllm_worker`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from evalq.backends import _torch_scores
from evalq.engine.backend import Batch, LoadRequest, Scores
from evalq.engine.columns import BESIDE, DEFAULT_COLUMNS, LOGPROB, REFERENCE, REFERENCE_ROWS, TOP1
from evalq.engine.reference import ReferenceHead
from evalq.errors import ModelError

# Of log-probabilities and top-1, vLLM's own are returned. Its logits are asked for the others.
MORE = tuple(column for column in _torch_scores.COLUMNS if column not in (LOGPROB, TOP1))
_DTYPES = {column.name: np.dtype(column.dtype) for column in _torch_scores.COLUMNS}
_EXTENSION = "evalq.backends._vllm_worker.ScoringExtension"
# Float32 logits of the reference that are worked on at once.
_CHUNK_BYTES_CPU = 96 * 2**20
_CHUNK_BYTES_GPU = 256 * 2**20
# Tensors of a chunk's size that exist at once: logits as they come and in float32, exponentials of both, two
# more on the way.
_CHUNKS_AT_ONCE = 6
# The worker's log-probability of a token and vLLM's own are the same number but for one more rounding.
_SAME_NATS = 1e-3


def wanted(request: LoadRequest) -> bool:
    """Whether a request asks for more than vLLM returns by itself."""
    return any(name not in DEFAULT_COLUMNS for name in request.columns)


def prepare(arguments: dict[str, Any], known: set[str]) -> None:
    """Engine arguments with which the workers show their logits.

    Args:
        arguments: of vllm.LLM, changed here.
        known: names that this version accepts.
    """
    if "worker_extension_cls" in known:
        arguments["worker_extension_cls"] = _EXTENSION


def chunk_bytes(request: LoadRequest, is_cpu: bool) -> int:
    """Float32 logits of the reference to work on at once."""
    return (_CHUNK_BYTES_CPU if is_cpu else _CHUNK_BYTES_GPU) // request.divide_work


def device_bytes(request: LoadRequest) -> int:
    """What the columns take on a GPU beside vLLM: the reference's head and a chunk."""
    if not wanted(request):
        return 0
    head, weight = request.reference, 0
    if head is not None and head.weight is not None:
        weight = head.weight.rows * head.width * (4 if head.dtype == "float32" else 2)
    return weight + _CHUNKS_AT_ONCE * chunk_bytes(request, is_cpu=False)


@dataclass
class WorkerColumns:
    """An engine whose workers score beside it.

    Args:
        engine: vllm.LLM.
        columns: names of what they give.
        head: how the model's own distributions are kept; None where that was not asked for or cannot be.
    """

    engine: Any
    columns: tuple[str, ...]
    head: ReferenceHead | None
    _folder: TemporaryDirectory[str] | None = None
    _given_up: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, llm: Any, request: LoadRequest, is_cpu: bool, notes: list[str]) -> "WorkerColumns | None":
        """Make the workers ready; None where they cannot, and a note says why. Raises ModelError."""
        names = [LOGPROB.name, *(column.name for column in MORE if column.name in request.columns)]
        if request.reference is None:
            beside = {column.name for column in BESIDE}
            names = [name for name in names if name not in beside]
        keep = str(request.path) if REFERENCE_ROWS in request.columns else None
        head = None if request.reference is None else request.reference.model_dump_json()
        why = "this version of vLLM has no worker_extension_cls"
        config = llm.llm_engine.vllm_config
        if getattr(config.parallel_config, "worker_extension_cls", "") == _EXTENSION:
            arguments = (names, head, keep, chunk_bytes(request, is_cpu))
            answer = _answer(llm.collective_rpc("evalq_begin", args=arguments))
            if "refused" not in answer:
                notes += answer["notes"]
                own = answer["head"]
                return cls(llm, tuple(names), own and ReferenceHead.model_validate_json(own))
            why = str(answer["refused"])
        notes.append(f"no columns beyond log-probability and top-1: {why}")
        return None

    def expect(self, batch: Batch, names: Sequence[str]) -> None:
        """Announce the windows of a batch, under the names that their requests will have."""
        if not self._asked(batch):
            return
        keep = REFERENCE_ROWS in batch.columns
        files = self._files(batch, names)
        windows = [
            [name, targets_R.tolist(), batch.first_target, file, keep]
            for name, targets_R, file in zip(names, batch.targets_BR, files, strict=True)
        ]
        self.engine.collective_rpc("evalq_expect", args=(windows, self._given_up))
        self._given_up = []

    def take(self, batch: Batch, names: Sequence[str]) -> Scores:
        """Columns of a batch whose requests have finished, with the log-probabilities. Raises ModelError."""
        if not self._asked(batch):
            return {}
        kept = REFERENCE_ROWS in batch.columns
        folder = str(self._path()) if kept else ""
        found = _answer(self.engine.collective_rpc("evalq_take", args=(list(names), folder)))
        scores = {
            column: np.stack([np.frombuffer(found[name][column], _DTYPES[column]) for name in names])
            for column in self.columns
            if column == LOGPROB.name or column in batch.columns
        }
        if kept:
            files = [self._path() / f"{name}.npy" for name in names]
            scores[REFERENCE_ROWS] = np.stack([np.load(file, allow_pickle=False) for file in files])
            for file in files:
                file.unlink()
        return scores

    def give_up(self, names: Sequence[str]) -> None:
        """Nobody will take these; the workers learn it with what comes next, for they may be gone."""
        self._given_up += names

    def close(self) -> None:
        """Remove what is left of rows on their way."""
        if self._folder is not None:
            self._folder.cleanup()

    def _path(self) -> Path:
        """A folder for rows on their way."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="evalq-vllm-")
        return Path(self._folder.name)

    def _asked(self, batch: Batch) -> bool:
        return any(name not in DEFAULT_COLUMNS for name in batch.columns)

    def _files(self, batch: Batch, names: Sequence[str]) -> list[str]:
        """Where the workers find the reference's rows of each window, "" without."""
        if REFERENCE not in batch.inputs:
            return [""] * len(names)
        files = getattr(batch.inputs, "files", None)
        if files is None:
            files = [self._path() / f"{name}.safetensors" for name in names]
            for file, rows in zip(files, batch.inputs[REFERENCE], strict=True):
                save_file({"rows": np.ascontiguousarray(rows)}, file)
        return [str(file) for file in files]


def joined(own: Scores, more: Scores) -> Scores:
    """The columns that vLLM returned with those of its workers.

    Raises:
        ModelError: the workers' log-probabilities are those of other tokens.
    """
    if not more:
        return own
    theirs, mine = more[LOGPROB.name], own[LOGPROB.name]
    with np.errstate(invalid="ignore"):
        apart = np.abs(theirs.astype(np.float64) - mine)
    worst = float(np.nanmax(np.where(np.isfinite(mine), apart, 0.0), initial=0.0))
    if worst > _SAME_NATS:
        raise ModelError(
            f"the log-probabilities that vLLM's worker saw differ by up to {worst:.3f} nats from those it "
            "returned",
            "engine_error",
            "this version of vLLM scores in another way than evalq knows: run without --kld",
        )
    return more | own


def _answer(answers: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Of the one worker that has logits. Raises ModelError: what went wrong there."""
    found = next((answer for answer in answers if answer is not None), None)
    if found is None:
        return {"refused": "no worker of vLLM has the model's head"}
    if "failure" in found:
        message, category, remedy = found["failure"]
        raise ModelError(message, category, remedy or None)
    return found
