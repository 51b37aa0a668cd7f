"""A running server: `vllm serve`, or any other with its way of scoring prompts.

Every window is a request of its own, a bounded number of them at the server at once; the server makes its
batches from what is there. Windows come back in order. The numbers are the server's: its hardware, data type
and settings, which is why its version and the fingerprint of its configuration are part of a result's
identity. What it loaded cannot be seen from outside, so `model_dir` is what the user says it serves.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.backends._server_client import Client
from evalq.backends._server_contact import Served, find_served, score, serves_elsewhere, with_top
from evalq.backends._server_options import OPTIONS, TOP_K, read_settings
from evalq.backends._server_scores import TOP_IDS, TOP_LOGPROBS
from evalq.backends._vllm_scores import Row
from evalq.checkpoint.headers import Checkpoint, open_checkpoint
from evalq.engine.backend import Backend, Batch, LoadedModel, LoadRequest, Scores
from evalq.engine.bound import bound, logprobs_of
from evalq.engine.columns import (
    KEPT_MASS,
    KLD,
    KLD_BOUND,
    LOGPROB,
    REFERENCE,
    REFERENCE_LOGPROB,
    TOP1,
    TOP1_BOUND,
)
from evalq.engine.reference import NumpyReference, Packed
from evalq.engine.registry import backend, tokenizer_backend
from evalq.errors import ModelError


@dataclass(frozen=True)
class _Handle:
    """A server and the model it scores with."""

    client: Client
    served: Served
    reference: NumpyReference | None = None


class ServerBackend(Backend):
    """A server that scores prompts."""

    # The client; the engine's own version comes from remote_versions().
    distributions = ("httpx2",)
    install = 'pip install "evalq[server]"'
    options = OPTIONS
    columns = (LOGPROB, TOP1, TOP1_BOUND, KLD, KLD_BOUND, KEPT_MASS, REFERENCE_LOGPROB)

    def load(self, request: LoadRequest) -> LoadedModel:
        """Find the model at the server; can it score windows of this length? Raises ModelError."""
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """In order, each batch as soon as it and those before it are done.

        Raises:
            ModelError: a window could not be scored, or its answer is not one for it.
        """
        with model.handle.client.keeping_key():
            yield from _scored(model.handle, batches)

    def close(self, model: LoadedModel) -> None:
        """End the connections; the server goes on."""
        model.handle.client.close()
        model.handle = None

    def remote_versions(self, options: Mapping[str, Any]) -> dict[str, str] | None:
        """What the numbers depend on at the server, the engine first. Raises ModelError."""
        client = Client(read_settings(dict(options)))
        try:
            with client.keeping_key():
                return dict(find_served(client).versions)
        finally:
            client.close()


def _load(request: LoadRequest) -> LoadedModel:
    if request.overlay is not None:
        raise ModelError("a second model_dir is for EXL3 only", "bad_option")
    checkpoint = open_checkpoint(request.path)
    client = Client(read_settings(request.options))
    try:
        with client.keeping_key():
            served = _checked(client, request)
            if request.reference is not None:
                served = with_top(client, served, request.options.get("top_k", TOP_K))
    except Exception:
        client.close()
        raise
    notes = list(served.notes)
    root = served.card.root
    if root is not None and serves_elsewhere(root, request.path):
        said = client.shown(root, 300)
        notes.append(f'the server says that it serves "{said}"; the bits are those of {request.path.name}')
    reference = None if request.reference is None else NumpyReference(request.reference)
    return LoadedModel(
        handle=_Handle(client, served, reference),
        vocab_size=checkpoint.vocab_size or request.token_ids_max + 1,
        max_positions=None,
        device=f"server {client.settings.host}",
        dtype="the server's",
        tokenize=_tokenize_fn(checkpoint, request.trust_remote_code),
        peak_memory_bytes=lambda: 0,  # what it takes there is not known here
        versions=served.versions,
        notes=notes,
        columns=served.columns,
    )


def _checked(client: Client, request: LoadRequest) -> Served:
    """The served model, if its windows are long enough."""
    served = find_served(client)
    longest, needed = served.card.max_model_len, request.window_tokens + 1
    if longest is not None and needed > longest:
        raise ModelError(
            f"a window has {request.window_tokens} tokens, the server's max_model_len is {longest}",
            "window_too_long",
            f"start the server with --max-model-len {needed} or more, or lower eval_len in the data spec",
        )
    return served


def _scored(handle: _Handle, batches: Iterable[Batch]) -> Iterator[Scores]:
    client, served = handle.client, handle.served
    in_flight = client.settings.max_in_flight
    left, stop = iter(batches), Event()
    waiting: deque[tuple[Batch, list[Future[Row]]]] = deque()
    pool = ThreadPoolExecutor(in_flight, "evalq-server")
    try:
        while True:
            # As many again as are in flight, so that a slow one at the front does not leave the server idle.
            while sum(len(rows) for _, rows in waiting) < 2 * in_flight:
                batch = next(left, None)
                if batch is None:
                    break
                asked = [(client, served, ids_T, batch.first_target - 1, stop) for ids_T in batch.ids_BT]
                waiting.append((batch, [pool.submit(score, *row) for row in asked]))
            if not waiting:
                return
            batch, futures = waiting.popleft()
            rows = [future.result() for future in futures]
            if handle.reference is not None and REFERENCE in batch.inputs:
                kept, targets = batch.inputs[REFERENCE], batch.targets_BR
                rows = [
                    row | _beside(handle.reference, kept_Rw, targets_R, row)
                    for row, kept_Rw, targets_R in zip(rows, kept, targets, strict=True)
                ]
            yield {column: np.stack([_column(row, column) for row in rows]) for column in batch.columns}
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _beside(reference: NumpyReference, kept_Rw: Packed, targets_R: NDArray[np.int64], row: Row) -> Row:
    """What the most probable tokens of a window say of its divergence from the reference."""
    logits_RV = reference.logits(kept_Rw)
    found = bound(logprobs_of(logits_RV, row[TOP_IDS]), row[TOP_LOGPROBS])
    return {
        KLD_BOUND.name: found.kld.astype(np.float32),
        KEPT_MASS.name: found.mass.astype(np.float32),
        REFERENCE_LOGPROB.name: logprobs_of(logits_RV, targets_R[:, None])[:, 0].astype(np.float32),
    }


def _column(row: Row, name: str) -> NDArray[Any]:
    if name not in row:
        raise ModelError(f"the server's first answer held {name}, a later one does not", "engine_error")
    return row[name]


def _tokenize_fn(checkpoint: Checkpoint, trust_remote_code: bool) -> Callable[[str], list[int]] | None:
    """The tokenizer of the checkpoint that the server is said to serve, None when it has none."""
    if checkpoint.kind == "safetensors" and not checkpoint.tokenizer_files:
        return None
    module = backend(tokenizer_backend("auto", checkpoint.path))
    tokenizer = module.load_tokenizer(checkpoint.path, trust_remote_code)
    return lambda text: list(tokenizer.encode(text, False))
