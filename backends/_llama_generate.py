"""Continuing prompts in llama.cpp: parallel sequences in a context of their own.

Prompts go in first, in steps of n_batch tokens that may hold the end of one and the beginning of the next.
Then each step holds the newest token of every sequence that is not done. The most probable token is looked up
in the logits where llama.cpp wrote them.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends import _llama
from evalq.backends._llama_batch import LlamaBatch
from evalq.engine.backend import Generated, Ids
from evalq.errors import ModelError


class Generation:
    """A context for continuing prompts."""

    def __init__(self, path: Path, model: Any, params: Any, vocab_size: int) -> None:
        """Make the context.

        Args:
            path: of the model, for messages.
            model: llama_model.
            params: llama_context_params.
            vocab_size: V.

        Raises:
            ModelError: oom_load, engine_error.
        """
        _llama.LOG.clear()
        self.context = _llama.engine().llama_init_from_model(model, params)
        if not self.context:
            raise _llama.failure("no context for generation could be made", path, "engine_error")
        self._path, self._vocab_size = path, vocab_size
        self._n_sequences = int(params.n_seq_max)
        self._tokens_each = int(params.n_ctx) // self._n_sequences
        self._batch = LlamaBatch(int(params.n_batch))

    def holds(self, n_prompts: int, n_tokens: int) -> bool:
        """Whether there is room for that many prompts of that many tokens, new ones included."""
        # Room for more sequences is not used for fewer: they would be slower than in a context of their own.
        return n_prompts == self._n_sequences and n_tokens <= self._tokens_each

    def generate(self, prompts: Sequence[Ids], new_tokens: int, stop_ids: frozenset[int]) -> Generated:
        """As `Backend.generate`; there is room for the prompts. Raises ModelError."""
        llama_cpp = _llama.engine()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        began = time.perf_counter()
        newest_B = self._prefill(prompts)
        first = time.perf_counter() - began
        found: list[list[int]] = [[int(token)] for token in newest_B]
        length_B = np.array([len(prompt) for prompt in prompts], np.int64)
        active = np.array([row for row, ids in enumerate(found) if ids[0] not in stop_ids], np.int64)
        for step in range(new_tokens - 1):
            if not len(active):
                break
            wanted = np.ones(len(active), np.bool_)
            batch = self._batch.fill_tokens(newest_B[active], length_B[active] + step, active, wanted)
            newest_B[active] = self._decoded(batch, len(active))
            for row in active:
                found[row].append(int(newest_B[row]))
            if stop_ids:
                active = np.array([row for row in active if found[row][-1] not in stop_ids], np.int64)
        seconds = time.perf_counter() - began
        return Generated([np.array(ids, np.int64) for ids in found], first, seconds)

    def close(self) -> None:
        """Free the context; a second call does nothing."""
        if self.context:
            _llama.engine().llama_free(self.context)
            self.context = None

    def _prefill(self, prompts: Sequence[Ids]) -> Ids:
        """The first new token of each prompt, int64 [B]."""
        ids_N = np.concatenate(prompts)
        position_N = np.concatenate([np.arange(len(prompt)) for prompt in prompts])
        sequence_N = np.repeat(np.arange(len(prompts)), [len(prompt) for prompt in prompts])
        last_N = np.append(sequence_N[1:] != sequence_N[:-1], True)
        newest_B = np.empty(len(prompts), np.int64)
        for start in range(0, len(ids_N), self._batch.capacity):
            part = slice(start, start + self._batch.capacity)
            wanted = last_N[part]
            batch = self._batch.fill_tokens(ids_N[part], position_N[part], sequence_N[part], wanted)
            newest_B[sequence_N[part][wanted]] = self._decoded(batch, int(wanted.sum()))
        return newest_B

    def _decoded(self, batch: Any, n_wanted: int) -> Ids:
        """Run a batch; the most probable token after each position whose logits are wanted."""
        llama_cpp = _llama.engine()
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            error = _llama.failure(f"llama_decode returned {status}", self._path, "engine_error")
            raise ModelError(error.message, "oom_forward") if error.category == "oom_load" else error
        if not n_wanted:
            return np.empty(0, np.int64)
        pointer = llama_cpp.llama_get_logits(self.context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (n_wanted, self._vocab_size))
        newest: Ids = logits.argmax(axis=1)
        return newest
