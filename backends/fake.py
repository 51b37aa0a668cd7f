"""A deterministic engine without a model, for tests and for writing a backend of your own.

Its `model_dir` is any directory with a `config.json`. The log-probabilities follow from `options`:

- "uniform": every token has probability 1/V, so the perplexity is V.
- "oracle": the true token has probability 1, so the perplexity is 1.
- "hashed" (default): a reproducible value from each token, its context and the seed.

`misbehave` makes it fail the way engines do: see OPTIONS.
"""

import ctypes
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evalq.engine.backend import (
    Backend,
    Batch,
    Encoded,
    Generated,
    Ids,
    LoadedModel,
    LoadRequest,
    Option,
    Piece,
    Scores,
    Tokenizer,
    check_generation,
    kv_cache_option,
)
from evalq.engine.columns import ENTROPY, LOGPROB, TOP1, TOP1_BOUND
from evalq.engine.kv_cache import KV_CACHE, CacheTypes, cache_of
from evalq.errors import ModelError

OPTIONS = {
    "mode": Option((str,), "uniform, oracle or hashed", ("uniform", "oracle", "hashed"), numeric=True),
    "vocab_size": Option((int,), "V (default 65536)", numeric=True, minimum=1),
    "seed": Option((int,), "of hashed (default 0)", numeric=True),
    "batch_windows": Option((int,), "windows per batch (default 1)", minimum=1),
    "seconds_per_window": Option((int, float), "sleep that long for each window (default 0)", minimum=0),
    "seconds_per_step": Option(
        (int, float), "sleep that long for each step of generating (default 0)", minimum=0
    ),
    "misbehave": Option(
        (str,),
        "fail the way an engine does; the choices say how (default: it behaves)",
        (
            "oom-load",
            "oom-forward",
            "oom-forward-once",
            "kill",
            "segfault",
            "hang",
            "nan",
            "some-nan",
            "wrong-shape",
            "chatter",
            "no-top1",
            "hold-interpreter",
            "ignore-cache",
            "hide-cache",
            "no-generate",
            "oom-generate",
        ),
        numeric=True,
    ),
    KV_CACHE: kv_cache_option(CacheTypes("fake", ("fp16", "q8_0", "q4_0"))),
    "misbehave_after": Option((int,), "windows scored before it does (default 0)"),
    "misbehave_from": Option((int,), "only in windows of so many tokens or more (default 0)"),
}


class _Tokenizer(Tokenizer):
    """UTF-8 bytes as ids, with 256 and 257 as BOS and EOS."""

    bos_id, eos_id, adds_bos, vocab_size = 256, 257, False, 258
    stop_ids = frozenset({ord("\t")})

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode(errors="surrogatepass"))

    def decode(self, ids: list[int]) -> str:
        """The bytes as text; BOS and EOS as nothing."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def chat_text(self, messages: Sequence[Mapping[str, str]], opening: bool = False) -> str:
        """A turn a line, "role: content", its end marked by a tab, the control token of this tokenizer."""
        known = ("system", "user", "assistant")
        wrong = next((m["role"] for m in messages if m["role"] not in known), None)
        if wrong is not None:
            raise ValueError(f"no such role: {wrong}")
        turns = "".join(f"{m['role']}: {m['content']}\t\n" for m in messages)
        return turns + ("assistant: " if opening else "")

    def encode_chat(self, text: str) -> Encoded:
        """Bytes; each of a character's stands where the character does."""
        places = [(i, i + 1) for i, sign in enumerate(text) for _ in sign.encode(errors="surrogatepass")]
        ids = self.encode(text, False)
        return Encoded(ids, places, [token == ord("\t") for token in ids])

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """A byte each."""
        return [Piece(bytes([token]) if token < 256 else b"", token >= 256) for token in ids]


class FakeBackend(Backend):
    """An engine that makes its numbers up, reproducibly."""

    distributions = ("evalq",)
    install = "pip install evalq"
    options = OPTIONS
    columns = (LOGPROB, TOP1, TOP1_BOUND, ENTROPY)
    has_tokenizer = True
    generates = True

    def load(self, request: LoadRequest) -> LoadedModel:
        """Read options; nothing is loaded."""
        return _load(request)

    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """Numbers as the mode says."""
        for batch in batches:
            yield _score(model, batch)

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """Bytes that follow from the tokens before them."""
        check_generation(prompts, new_tokens, model.max_positions, model.vocab_size)
        return _generate(model.handle, prompts, new_tokens, stop_ids)

    def close(self, model: LoadedModel) -> None:
        """Nothing to free."""
        if model.handle is None:
            raise ModelError("closed twice", "engine_error")
        model.handle = None

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores | None:
        """Without the rounding that it makes up for a cache."""
        if model.handle.get("misbehave") == "hide-cache":
            return None
        plain = {name: value for name, value in model.handle.items() if name != KV_CACHE}
        return _score(replace(model, handle=plain), batch)

    def load_tokenizer(self, path: Path, trust_remote_code: bool = False) -> Tokenizer:
        """The byte tokenizer, whatever the path."""
        return _Tokenizer()


def _load(request: LoadRequest) -> LoadedModel:
    """Read options; nothing is loaded."""
    options = dict(request.options)
    if options.get("misbehave") == "oom-load":
        raise MemoryError("failed to allocate 1.00 TiB")
    if options.get("misbehave") == "chatter":
        print("an engine that prints to standard output\n" * 3, flush=True)
    config = request.path / "config.json"
    positions = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    if options.get("misbehave") == "oom-forward-once" and request.divide_work == 1:
        options["misbehave"] = "oom-forward"
    options["scored"] = 0
    return LoadedModel(
        handle=options,
        vocab_size=options.get("vocab_size", 65536),
        max_positions=positions,
        device="cpu",
        dtype="float32",
        batch_windows=options.get("batch_windows", 1),
        notes=["not a model"],
        columns=("logprob", "top1_bound") if options.get("misbehave") == "no-top1" else None,
    )


def _score(model: LoadedModel, batch: Batch) -> Scores:
    options: dict[str, Any] = model.handle
    n_windows = len(batch.ids_BT)
    time.sleep(options.get("seconds_per_window", 0) * n_windows)
    mode = options.get("mode", "hashed")
    if mode == "uniform":
        logprob = np.full(batch.shape, -np.log(model.vocab_size), np.float32)
    elif mode == "oracle":
        logprob = np.zeros(batch.shape, np.float32)
    else:
        logprob = _hashed(batch.ids_BT, batch.first_target, options.get("seed", 0))
    cache = cache_of(options)
    if cache is not None and options.get("misbehave") not in ("ignore-cache", "hide-cache"):
        logprob *= np.float32(1 + 2**-cache.bits)
    long_enough = batch.ids_BT.shape[1] >= options.get("misbehave_from", 0)
    if long_enough and options["scored"] >= options.get("misbehave_after", 0):
        logprob = _misbehave(options.get("misbehave"), logprob)
    options["scored"] += n_windows
    everything: Scores = {
        "logprob": logprob,
        "top1": logprob > -1.0,
        "top1_bound": logprob > np.log(0.5),
        "entropy": -logprob,
    }
    return {name: everything[name] for name in batch.columns}


def _generate(
    options: dict[str, Any], prompts: Sequence[Ids], new_tokens: int, stop_ids: frozenset[int]
) -> Generated:
    how = options.get("misbehave")
    if how == "no-generate":
        raise ModelError("fake does not generate here", "bad_option")
    if how == "oom-generate":
        raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    began = time.perf_counter()
    first = 0.0
    found: list[list[int]] = [[] for _ in prompts]
    totals = [int(prompt.sum()) + options.get("seed", 0) for prompt in prompts]
    for step in range(new_tokens):
        time.sleep(options.get("seconds_per_step", 0))
        for row, ids in enumerate(found):
            if not (ids and ids[-1] in stop_ids):
                ids.append((totals[row] * 31 + 7 * step) % 256)
                totals[row] += ids[-1]
        first = first or time.perf_counter() - began
    return Generated([np.array(ids, np.int64) for ids in found], first, time.perf_counter() - began)


def _hashed(ids_BT: Ids, first_target: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    mixed = np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15) + np.cumsum(ids_BT, axis=1).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    unit = (mixed >> np.uint64(40)).astype(np.float64) / 2**24
    return (-6.0 * unit[:, first_target:]).astype(np.float32)


def _misbehave(how: str | None, logprob: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
    if how == "oom-forward":
        raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how in ("kill", "segfault"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
    if how == "hang":
        time.sleep(3600)
    if how == "hold-interpreter":
        ctypes.PyDLL(None).sleep(3600)  # a call that keeps Python's lock: no thread runs beside it
    if how == "nan":
        return np.full_like(logprob, np.nan)
    if how == "some-nan":
        logprob = logprob.copy()
        logprob[0, 0] = -np.inf
    if how == "wrong-shape":
        return logprob[:, 1:]
    return logprob
