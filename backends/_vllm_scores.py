"""From vLLM's prompt log-probabilities to the scores of a window's targets.

`prompt_logprobs[i]` is ln P(token i | tokens before i), element 0 is empty, and the prompt's own token is
the first entry of each element, whatever else was asked for. Its rank counts the tokens with at least its
probability, so rank 1 is the most probable token alone (a tie for the first place is rank 2).

Sources: https://docs.vllm.ai/en/latest/api/vllm/outputs/ and https://docs.vllm.ai/en/latest/api/vllm/logprobs/
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import LOGPROB, TOP1, TOP1_BOUND
from evalq.errors import ModelError

# A token that has more than half of the probability is the most probable one.
LN_HALF = math.log(0.5)


Row = dict[str, NDArray[Any]]  # column name -> [R]


def from_prompt_logprobs(found: Any, ids_T: NDArray[np.int64], start: int) -> Row:
    """Scores from `RequestOutput.prompt_logprobs`, flat or a list of dictionaries.

    Args:
        found: FlatLogprobs, or [None, {id: Logprob}, ...], one element per token of the window.
        ids_T: the window's ids, int64 [T].
        start: targets are ids_T[start+1:].

    Raises:
        ModelError: a log-probability is missing, or belongs to another token than the window's.
    """
    n_tokens = len(ids_T)
    n_found = 0 if found is None else len(found)
    if n_found != n_tokens:
        raise ModelError(f"vLLM returned {n_found} prompt log-probabilities, not {n_tokens}", "engine_error")
    read = _from_flat if hasattr(found, "start_indices") else _from_dictionaries
    ids, logprobs, ranks = read(found, ids_T, start)
    wrong = np.flatnonzero(ids != ids_T[start + 1 :])
    if len(wrong):
        at = int(wrong[0])
        raise ModelError(
            f"vLLM scored token {ids[at]} where the window has {ids_T[start + 1 + at]} (position "
            f"{start + 1 + at}), {len(wrong)} of {len(ids)} positions differ",
            "engine_error",
        )
    return {LOGPROB.name: logprobs, TOP1.name: ranks == 1}


def from_token_id_logprobs(found: Any, n_targets: int) -> Row:
    """Scores from `RequestOutput.prompt_token_id_logprobs`, which has no ranks.

    Whether the token is the most probable one is therefore known only above one half.

    Args:
        found: float32 [n_targets, 1].
        n_targets: T-1-start.

    Raises:
        ModelError: there is none, or it has another shape.
    """
    shape = None if found is None else tuple(np.shape(found))
    if shape != (n_targets, 1):
        raise ModelError(
            f"vLLM returned token log-probabilities of shape {shape}, not {(n_targets, 1)}", "engine_error"
        )
    logprob = np.asarray(found, np.float32)[:, 0]
    return {LOGPROB.name: logprob, TOP1_BOUND.name: logprob > LN_HALF}


_Entries = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def _from_flat(found: Any, ids_T: NDArray[np.int64], start: int) -> _Entries:
    """First entry of each target's range; lists of one number per entry, so nothing is built per token."""
    first = np.asarray(found.start_indices, np.int64)[start + 1 :]
    last = np.asarray(found.end_indices, np.int64)[start + 1 :]
    if (first == last).any():
        at = start + 1 + int(np.flatnonzero(first == last)[0])
        raise ModelError(f"vLLM returned no log-probability for position {at}", "engine_error")
    ids = np.asarray(found.token_ids, np.int64)[first]
    ranks = np.asarray([-1 if rank is None else rank for rank in found.ranks], np.int64)[first]
    return ids, np.asarray(found.logprobs, np.float32)[first], ranks


def _from_dictionaries(found: Any, ids_T: NDArray[np.int64], start: int) -> _Entries:
    """The window's own token of each element; its first key where that is another, to be reported."""
    ids, logprobs, ranks = [], [], []
    for at in range(start + 1, len(ids_T)):
        element = found[at]
        if not element:
            raise ModelError(f"vLLM returned no log-probability for position {at}", "engine_error")
        token = int(ids_T[at])
        token = token if token in element else next(iter(element))
        entry = element[token]
        ids.append(token)
        logprobs.append(entry.logprob)
        ranks.append(-1 if entry.rank is None else entry.rank)
    return np.asarray(ids, np.int64), np.asarray(logprobs, np.float32), np.asarray(ranks, np.int64)
