"""Inside vLLM's worker: columns of each scored token, worked out where its logits are.

vLLM's first model runner makes the log-probabilities of a prompt in `_get_prompt_logprobs_dict`: for each
request in the order of `num_prompt_logprobs`, and each chunk of its prompt, it calls `model.compute_logits`,
`sampler.compute_logprobs` and `sampler.gather_logprobs`, the last one with float32 log-probabilities of the
whole vocabulary. Before the first of these calls the requests and positions of a step are noted; after each
call of the last one its rows are reduced, a few at a time, to numbers per token. They are log-probabilities
already, which a softmax leaves as they are.

The class is named in `worker_extension_cls`; its methods are called by `collective_rpc` with plain data. What
is kept of a reference is read from its files and written to a folder: rows never pass through a call.

Source: https://docs.vllm.ai/en/latest/api/vllm/config/parallel/ (worker_extension_cls), and vLLM 0.26 and
0.32 themselves.

Axes in names: R targets of a window, V vocabulary, d inputs of the head.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from evalq.backends._torch_reference import TorchReference, pack_rows, reference_notes
from evalq.backends._torch_scores import score_rows
from evalq.backends._vllm_reference import HeadProbe
from evalq.engine.columns import BESIDE
from evalq.engine.failures import from_exception
from evalq.engine.reference import Packed, ReferenceHead
from evalq.errors import ModelError

_BESIDE = {column.name for column in BESIDE}


class ScoringExtension:
    """Methods that vLLM adds to its workers. Only the worker that has logits answers with more than None."""

    model_runner: Any

    def evalq_begin(
        self, columns: list[str], reference: str | None, checkpoint: str | None, chunk_bytes: int
    ) -> dict[str, Any] | None:
        """Make ready to score.

        Args:
            columns: names of those that any window may be asked for.
            reference: the ReferenceHead that this model is compared with, as JSON.
            checkpoint: the model's directory, where its own head inputs are to be kept.
            chunk_bytes: of the float32 logits that are worked on at once.

        Returns:
            "notes", and "head": the model's own ReferenceHead as JSON, or None; or "refused": why not.
            Or "failure", as evalq_take() gives it.
        """
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        if not get_pp_group().is_last_rank:
            return None
        probe = None if checkpoint is None else HeadProbe.of(self.model_runner)
        if get_tensor_model_parallel_rank() != 0:
            return None
        runner = self.model_runner
        sampler = getattr(runner, "sampler", None)
        if not (hasattr(runner, "_get_prompt_logprobs_dict") and hasattr(sampler, "gather_logprobs")):
            return {"refused": "this vLLM's model runner does not show its distributions"}
        try:
            beside = None
            if reference is not None:
                beside = TorchReference(ReferenceHead.model_validate_json(reference), runner.device)
            head = None if probe is None or checkpoint is None else probe.reference_head(Path(checkpoint))
        except Exception as error:  # whatever it is, it is told where it can be raised
            return {"failure": _plain(error)}
        tap = Tap(runner, tuple(columns), beside, chunk_bytes)
        if probe is not None and head is not None:
            probe.processor.register_forward_pre_hook(tap.note_rows)
        self._evalq_tap = tap
        notes = [] if beside is None else reference_notes(beside)
        return {"notes": notes, "head": None if head is None else head.model_dump_json()}

    def evalq_expect(self, windows: list[list[Any]], given_up: list[str]) -> None:
        """Requests that will come.

        Args:
            windows: [name, first target, number of targets, file of reference rows or "", keep] of each.
            given_up: names of earlier ones that nobody will take.
        """
        tap = self._evalq_listening()
        if tap is not None:
            for name in given_up:
                tap.windows.pop(name, None)
            for name, first, n_targets, file, keep in windows:
                tap.windows[name] = Expected(first, n_targets, file, keep)

    def evalq_take(self, names: list[str], folder: str) -> dict[str, Any] | None:
        """Results of finished requests, which are then forgotten.

        Args:
            names: of the requests.
            folder: where kept rows go, NAME.npy of each window.

        Returns:
            Name -> column -> bytes of its array [R]. Or "failure": [message, category, remedy or ""].
        """
        tap = self._evalq_listening()
        return None if tap is None else tap.take(names, Path(folder))

    def _evalq_listening(self) -> "Tap | None":
        return getattr(self, "_evalq_tap", None)


@dataclass
class Expected:
    """A window on its way through the engine.

    Args:
        first_target: index of its first target among its tokens, at least 1.
        n_targets: R.
        file: the reference's rows, "" for a window that is not compared.
        keep: whether the inputs of its head are kept.
        found: column -> tensor [R].
        rows: [R, width], where they are kept.
        scored: which targets are done, bool [R].
    """

    first_target: int
    n_targets: int
    file: str
    keep: bool
    found: dict[str, Any] = field(default_factory=dict)
    rows: Packed | None = None
    scored: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """None is done."""
        self.scored = np.zeros(self.n_targets, bool)


@dataclass(frozen=True)
class _Piece:
    """What one call of gather_logprobs is about.

    Args:
        window: None for a request that nobody asked about.
        position: of the token whose logits are in the first row.
        n_rows: rows.
    """

    window: Expected | None
    position: int
    n_rows: int


class Tap:
    """Listens to a model runner and reduces the log-probabilities that it makes."""

    def __init__(
        self, runner: Any, columns: tuple[str, ...], reference: TorchReference | None, chunk_bytes: int
    ) -> None:
        """Wrap the two methods of this runner and its sampler."""
        self.windows: dict[str, Expected] = {}
        self._runner = runner
        self._columns = columns
        self._reference = reference
        self._chunk_bytes = chunk_bytes
        self._pieces: deque[_Piece] = deque()
        self._rows_nd: Any = None
        self._failure: list[str] | None = None
        runner._get_prompt_logprobs_dict = self._around_step(runner._get_prompt_logprobs_dict)
        runner.sampler.gather_logprobs = self._around_gather(runner.sampler.gather_logprobs)

    def note_rows(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before the logits: (head, what goes into it [n, d], ...)."""
        self._rows_nd = inputs[1]

    def take(self, names: Sequence[str], folder: Path) -> dict[str, Any]:
        """As ScoringExtension.evalq_take()."""
        windows = {name: self.windows.pop(name) for name in names}
        for window in windows.values():
            if self._failure is None and not window.scored.all():
                done, of = int(window.scored.sum()), window.n_targets
                self._failure = _plain(
                    ModelError(f"vLLM showed the distributions of {done} of {of} tokens", "engine_error")
                )
        if self._failure is not None:
            return {"failure": self._failure}
        for name, window in windows.items():
            if window.rows is not None:
                np.save(folder / f"{name}.npy", window.rows, allow_pickle=False)
        return {
            name: {column: values.cpu().numpy().tobytes() for column, values in window.found.items()}
            for name, window in windows.items()
        }

    def _around_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(hidden_states: Any, num_scheduled_tokens: dict[str, int], *more: Any) -> Any:
            self._pieces.extend(self._expected_pieces(num_scheduled_tokens))
            try:
                return inner(hidden_states, num_scheduled_tokens, *more)
            finally:
                self._pieces.clear()
                self._rows_nd = None

        return step

    def _around_gather(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def gather(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
            found = inner(logprobs, num_logprobs, token_ids)
            if self._pieces and self._failure is None:
                try:
                    # Nobody reads the log-probabilities after this call: they are overwritten.
                    self._reduce(self._pieces.popleft(), logprobs, token_ids)
                except Exception as error:  # an error raised here would end the engine without its words
                    self._failure = _plain(error)
            return found

        return gather

    def _expected_pieces(self, num_scheduled_tokens: dict[str, int]) -> Iterator[_Piece]:
        """The calls of gather_logprobs that this step will make, as the runner decides on them."""
        for name in self._runner.num_prompt_logprobs:
            n_tokens = num_scheduled_tokens.get(name)
            request = self._runner.requests[name]
            if n_tokens is None or request.prompt_token_ids is None:
                continue
            position = request.num_computed_tokens
            n_rows = min(n_tokens, len(request.prompt_token_ids) - 1 - position)
            if n_rows > 0:
                yield _Piece(self._window(name), position, n_rows)

    def _window(self, name: str) -> Expected | None:
        """Newer versions put "-" and random letters behind a request's name."""
        return self.windows.get(name) or self.windows.get(name.rpartition("-")[0])

    def _reduce(self, piece: _Piece, logprobs_nV: Any, token_ids_n: Any) -> None:
        if len(logprobs_nV) != piece.n_rows:
            message = f"vLLM scored {len(logprobs_nV)} tokens where {piece.n_rows} were scheduled"
            raise ModelError(message, "engine_error")
        window = piece.window
        if window is None:
            return
        before = window.first_target - 1 - piece.position  # rows of tokens that are not scored
        first = max(0, before)
        part = slice(first - before, piece.n_rows - before)
        if part.start >= part.stop:
            return
        if window.keep:
            self._keep(window, part, piece.n_rows)
        scores_RV, targets_R = logprobs_nV[first:], token_ids_n[first:]
        reference_of = self._reference_of(window, part)
        found = score_rows(
            lambda rows: scores_RV[rows],
            targets_R,
            max(1, self._chunk_bytes // (4 * scores_RV.shape[-1])),
            [name for name in self._columns if reference_of is not None or name not in _BESIDE],
            reference_of=reference_of,
        )
        for name, values in found.items():
            if name not in window.found:
                window.found[name] = values.new_empty(window.n_targets)
            window.found[name][part] = values
        window.scored[part] = True

    def _reference_of(self, window: Expected, part: slice) -> Callable[[slice], Any] | None:
        """Rows of a part of a window -> logits of the reference."""
        reference = self._reference
        if reference is None or not window.file:
            return None
        rows_Rd = reference.rows(_read_rows(window, part, reference.head))
        return lambda rows: reference.logits(rows_Rd[rows])

    def _keep(self, window: Expected, part: slice, n_rows: int) -> None:
        if self._rows_nd is None or len(self._rows_nd) != n_rows:
            raise ModelError("vLLM did not show what goes into the model's head", "engine_error")
        packed = pack_rows(self._rows_nd[n_rows - (part.stop - part.start) :])
        if window.rows is None:
            window.rows = np.zeros((window.n_targets, packed.shape[-1]), packed.dtype)
        window.rows[part] = packed


def _read_rows(window: Expected, part: slice, head: ReferenceHead) -> Packed:
    """Some of a window's rows of the reference, [n, width]. Raises ModelError (model_missing)."""
    try:
        with safe_open(window.file, "numpy") as file:
            rows = file.get_slice("rows")
            shape, made_for = tuple(rows.get_shape()), (file.metadata() or {}).get("head", head.digest)
            if shape == (window.n_targets, head.row_shape[0]) and made_for == head.digest:
                found: Packed = rows[part.start : part.stop]
                return found
            why = f"rows of shape {shape}, or of another head"
    except (OSError, SafetensorError) as error:
        why = str(error)
    raise ModelError(
        f"the reference's rows cannot be read from {window.file}: {why}",
        "model_missing",
        "run again: the reference is scored again where its rows are missing",
    )


def _plain(error: Exception) -> list[str]:
    """An error as plain data: message, category, remedy."""
    found = from_exception(error, "forward")
    return [found.message, found.category, found.remedy or ""]
