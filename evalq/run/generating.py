"""A worker's job: a model's own answers, kept as they come."""

import time
from collections.abc import Callable
from pathlib import Path

from evalq.checkpoint.adapter import read_adapter
from evalq.data.tokens import TokenStream, read_stream
from evalq.engine.backend import LoadRequest
from evalq.engine.registry import backend
from evalq.errors import StoreError
from evalq.results.answers import KeptAnswers, documents
from evalq.run.checks import check_tokens
from evalq.run.job import GenerateJob

Emit = Callable[..., None]


def generate(job: GenerateJob, emit: Emit) -> None:
    """Answer every prompt whose answer is not kept.

    Events: "answered" (prompts answered so far, of how many).

    Raises:
        ModelError: the model cannot be loaded, or cannot answer.
        StoreError: the prompts cannot be read, or answers cannot be kept.
    """
    kept = KeptAnswers(Path(job.answers_dir))
    with kept.lock(on_wait=lambda: emit("waiting")):
        stream = read_stream(Path(job.prompts_file))
        if stream is None:
            raise StoreError(f"cannot read the tokens {job.prompts_file}", "run again")
        prompts = documents(stream)
        left = [prompt for prompt in prompts if kept.read(prompt) is None]
        if not left:
            return
        emit("loading")
        began = time.perf_counter()
        loader, generator = backend(job.load), backend(job.forward)
        model = loader.load(_request(job, stream))
        emit("loaded", seconds=time.perf_counter() - began, device=model.device)
        check_tokens(model, stream)
        there = len(prompts) - len(left)
        for first in range(0, len(left), job.at_once):
            batch = left[first : first + job.at_once]
            found = generator.generate(model, batch, job.new_tokens, frozenset(stream.stop_ids))
            for prompt, ids in zip(batch, found.ids, strict=True):
                kept.write(prompt, ids)
            there += len(batch)
            emit("progress", answered=there, of=len(prompts))
        loader.close(model)


def _request(job: GenerateJob, stream: TokenStream) -> LoadRequest:
    longest = max(len(prompt) for prompt in documents(stream))
    return LoadRequest(
        path=Path(job.path),
        window_tokens=longest + job.new_tokens,
        targets_per_window=1,
        options=job.options,
        trust_remote_code=job.trust_remote_code,
        overlay=Path(job.overlay) if job.overlay else None,
        load_fn=job.load_fn,
        n_windows=0,
        n_targets=0,
        token_ids_max=int(stream.ids_N.max()),
        adapter=read_adapter(Path(job.lora.path), job.lora.name) if job.lora else None,
        generate=job.at_once,
        prompt_tokens=longest,
        new_tokens=job.new_tokens,
    )
