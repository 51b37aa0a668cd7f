"""A worker's job: how fast a model generates and scores, with a warm-up that is not counted."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evalq.checkpoint.adapter import read_adapter
from evalq.data.tokens import read_stream
from evalq.engine.backend import Backend, Batch, Ids, LoadedModel, LoadRequest
from evalq.engine.columns import DEFAULT_COLUMNS
from evalq.engine.failures import from_exception
from evalq.engine.registry import backend
from evalq.errors import ModelError, StoreError
from evalq.results.speed import Figure, Part, SpeedSettings
from evalq.run.checks import given_columns
from evalq.run.job import SpeedJob

Emit = Callable[..., None]
# As many new tokens as show an engine all of its kernels.
WARM_UP_TOKENS = 16


def time_model(job: SpeedJob, emit: Emit) -> None:
    """Measure each part; one that fails is told as an event, and the others are measured.

    Events: "speed" (figure, values) and "not_measured" (part, message).

    Raises:
        ModelError: the model cannot be loaded.
        StoreError: the tokens cannot be read.
    """
    stream = read_stream(Path(job.tokens_file))
    if stream is None:
        raise StoreError(f"cannot read the tokens {job.tokens_file}", "run again")
    emit("loading")
    loader = backend(job.load)
    began = time.perf_counter()
    model = loader.load(_request(job, stream.ids_N))
    emit("loaded", seconds=time.perf_counter() - began, device=model.device)
    clock = _Clock(backend(job.forward), model, _Pieces(stream.ids_N, job.settings), job.settings)
    for part in job.parts:
        try:
            for figure, values in clock.measured(part).items():
                emit("speed", figure=figure, values=values)
        except Exception as error:  # a part that runs out of memory says nothing about the next one
            found = from_exception(error, "forward")
            emit("not_measured", part=part, message=found.message)
    loader.close(model)


def _request(job: SpeedJob, ids_N: Ids) -> LoadRequest:
    settings = job.settings
    scores, generates = "scoring" in job.parts, set(job.parts) != {"scoring"}
    return LoadRequest(
        path=Path(job.path),
        window_tokens=settings.prompt_tokens,
        targets_per_window=settings.prompt_tokens - 1,
        options=job.options,
        trust_remote_code=job.trust_remote_code,
        overlay=Path(job.overlay) if job.overlay else None,
        load_fn=job.load_fn,
        n_windows=settings.windows if scores else 0,
        n_targets=settings.windows * (settings.prompt_tokens - 1) if scores else 0,
        token_ids_max=int(ids_N.max()),
        adapter=read_adapter(Path(job.lora.path), job.lora.name) if job.lora else None,
        generate=settings.batch if generates else 0,
        prompt_tokens=settings.prompt_tokens if generates else 0,
        new_tokens=settings.new_tokens if generates else 0,
    )


@dataclass
class _Pieces:
    """Prompts of one length, cut from a stream one after the other; after its end from its start again.

    No prompt comes twice as long as the stream lasts: a server that keeps prompts would answer the second
    time without reading it.
    """

    ids_N: Ids
    settings: SpeedSettings
    taken: int = field(default=0)

    def take(self, n: int) -> list[Ids]:
        """The next n."""
        length = self.settings.prompt_tokens
        starts = [(self.taken + i) * length for i in range(n)]
        self.taken += n
        return [self.ids_N[(start + np.arange(length)) % len(self.ids_N)] for start in starts]


@dataclass
class _Clock:
    """Times a loaded model."""

    backend: Backend
    model: LoadedModel
    pieces: _Pieces
    settings: SpeedSettings

    def measured(self, part: Part) -> dict[Figure, list[float]]:
        """The figures of a part, a value for each repetition. Raises whatever the engine does."""
        if part == "scoring":
            return {"scoring": self._scoring()}
        if part == "batch":
            return {"generation_batch": [rate for rate, _ in self._generating(self.settings.batch)]}
        found = list(self._generating(1))
        rates, seconds = [rate for rate, _ in found], [first for _, first in found]
        return {"generation": rates, "first_token_seconds": seconds}

    def _generating(self, n_prompts: int) -> Iterator[tuple[float, float]]:
        """(new tokens per second after the first, seconds to the first) of each repetition."""
        new_tokens = self.settings.new_tokens
        self.backend.generate(self.model, self.pieces.take(n_prompts), min(new_tokens, WARM_UP_TOKENS))
        for _ in range(self.settings.repeats):
            found = self.backend.generate(self.model, self.pieces.take(n_prompts), new_tokens)
            lengths = [len(ids) for ids in found.ids]
            if lengths != [new_tokens] * n_prompts:
                raise ModelError(
                    f"the engine generated {min(lengths, default=0)} tokens of {new_tokens}", "engine_error"
                )
            decoding = found.seconds - found.first_token_seconds
            yield n_prompts * (new_tokens - 1) / max(decoding, 1e-9), found.first_token_seconds

    def _scoring(self) -> list[float]:
        """Scored tokens per second of each repetition."""
        columns = given_columns(self.backend, self.model, DEFAULT_COLUMNS)
        rates = []
        for repetition in range(self.settings.repeats + 1):
            ids_WT = np.stack(self.pieces.take(self.settings.windows))
            at_once = max(1, self.model.batch_windows)
            batches = [Batch(ids_WT[i : i + at_once], 1, columns) for i in range(0, len(ids_WT), at_once)]
            began, once = time.perf_counter(), self.model.setup_seconds
            tokens = sum(scores[columns[0]].size for scores in self.backend.score(self.model, batches))
            seconds = time.perf_counter() - began - (self.model.setup_seconds - once)
            if repetition:  # the first time kernels are compiled or chosen
                rates.append(tokens / max(seconds, 1e-9))
        return rates
