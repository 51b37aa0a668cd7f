"""Where vLLM's model runners show the logits of a prompt, and whose they are.

The first runner makes log-probabilities in `_get_prompt_logprobs_dict`: for each request in the order of
`num_prompt_logprobs`, and each chunk of its prompt, it calls `model.compute_logits`,
`sampler.compute_logprobs` and `sampler.gather_logprobs`, the last one with float32 log-probabilities of the
whole vocabulary. A softmax leaves these as they are.

The second runner has a `prompt_logprobs_worker`, which takes the rows of a whole step, all requests one after
another, through the head in chunks.

Source: vLLM 0.26 and 0.32, v1/worker/gpu_model_runner.py, v1/worker/gpu/sample/prompt_logprob.py

Axes in names: n rows of logits, d inputs of the head, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from evalq.backends._vllm_tap import Piece, Tap


def listen(runner: Any, tap: Tap) -> bool:
    """Have a model runner give its logits to `tap` too; False for one that is neither of the two."""
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if hasattr(worker, "compute_prompt_logprobs"):
        _listen_to_second(worker, tap)
        return True
    if hasattr(runner, "_get_prompt_logprobs_dict") and hasattr(
        getattr(runner, "sampler", None), "gather_logprobs"
    ):
        _listen_to_first(runner, tap)
        return True
    return False


def _listen_to_first(runner: Any, tap: Tap) -> None:
    inner_step, inner_gather = runner._get_prompt_logprobs_dict, runner.sampler.gather_logprobs
    pieces: deque[Piece] = deque()

    def step(hidden_states: Any, num_scheduled_tokens: dict[str, int], *more: Any) -> Any:
        pieces.extend(_pieces_of_first(runner, num_scheduled_tokens, tap))
        try:
            return inner_step(hidden_states, num_scheduled_tokens, *more)
        finally:
            pieces.clear()

    def gather(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        found = inner_gather(logprobs, num_logprobs, token_ids)
        if pieces:
            # Nobody reads the log-probabilities after this call: they are overwritten.
            tap.reduce([pieces.popleft()], logprobs, overwrite=True)
        return found

    runner._get_prompt_logprobs_dict = step
    runner.sampler.gather_logprobs = gather


def _pieces_of_first(runner: Any, num_scheduled_tokens: dict[str, int], tap: Tap) -> Iterator[Piece]:
    """The calls of gather_logprobs that this step will make, as the runner decides on them."""
    for name in runner.num_prompt_logprobs:
        n_tokens = num_scheduled_tokens.get(name)
        request = runner.requests[name]
        if n_tokens is None or request.prompt_token_ids is None:
            continue
        position = request.num_computed_tokens
        n_rows = min(n_tokens, len(request.prompt_token_ids) - 1 - position)
        if n_rows > 0:
            yield Piece(tap.window(name), position, 0, n_rows)


def _listen_to_second(worker: Any, tap: Tap) -> None:
    inner = worker.compute_prompt_logprobs

    def compute(logits_fn: Any, hidden_states: Any, input_batch: Any, *more: Any) -> Any:
        pieces = list(_pieces_of_second(input_batch, tap))
        seen = 0

        def listening(rows_nd: Any) -> Any:
            nonlocal seen
            logits_nV = logits_fn(rows_nd)
            chunk = range(seen, seen + len(rows_nd))
            seen = chunk.stop
            inside = [piece.inside(chunk) for piece in pieces]
            tap.reduce([piece for piece in inside if piece.n_rows > 0], logits_nV, overwrite=False)
            return logits_nV

        return inner(listening, hidden_states, input_batch, *more)

    worker.compute_prompt_logprobs = compute


def _pieces_of_second(input_batch: Any, tap: Tap) -> Iterator[Piece]:
    """Rows of this step that are a window's; the last one of a window predicts what follows it."""
    for i, name in enumerate(input_batch.req_ids):
        window = tap.window(name)
        if window is None:
            continue
        position = int(input_batch.num_computed_prefill_tokens_np[i])
        n_rows = min(int(input_batch.num_scheduled_tokens[i]), window.n_tokens - 1 - position)
        if n_rows > 0:
            yield Piece(window, position, int(input_batch.query_start_loc_np[i]), n_rows)
