"""Inside vLLM's worker: columns of each scored token, worked out where its logits are.

The class is named in `worker_extension_cls`; its methods are called by `collective_rpc` with plain data. What
is kept of a reference is read from its files and written to a folder: rows never pass through a call.

Source: https://docs.vllm.ai/en/latest/api/vllm/config/parallel/ (worker_extension_cls)
"""

from pathlib import Path
from typing import Any

from evalq.backends._torch_reference import TorchReference, reference_notes
from evalq.backends._vllm_reference import HeadProbe
from evalq.backends._vllm_runners import listen
from evalq.backends._vllm_tap import Expected, Tap, plain
from evalq.engine.reference import ReferenceHead


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
        try:
            beside = None
            if reference is not None:
                beside = TorchReference(ReferenceHead.model_validate_json(reference), runner.device)
            head = None if probe is None or checkpoint is None else probe.reference_head(Path(checkpoint))
        except Exception as error:  # whatever it is, it is told where it can be raised
            return {"failure": plain(error)}
        tap = Tap(runner.device, tuple(columns), beside, chunk_bytes)
        if not listen(runner, tap):
            return {"refused": "this vLLM's model runner does not show its distributions"}
        if probe is not None and head is not None:
            probe.processor.register_forward_pre_hook(tap.note_rows)
        self._evalq_tap = tap
        notes = [] if beside is None else reference_notes(beside)
        return {"notes": notes, "head": None if head is None else head.model_dump_json()}

    def evalq_expect(self, windows: list[list[Any]], given_up: list[str]) -> None:
        """Requests that will come.

        Args:
            windows: [name, targets, index of the first one among the window's tokens, file of reference rows
                or "", keep] of each.
            given_up: names of earlier ones that nobody will take.
        """
        tap = self._evalq_listening()
        if tap is not None:
            tap.expect([Expected(*window) for window in windows], given_up)

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
