"""The contract between the framework and an engine.

A backend is a module (or any object) with three functions, a table of options and what it is made of:

    DISTRIBUTIONS: tuple[str, ...]                           its packages, the engine first ("a|b": either)
    INSTALL: str                                             the command that installs them
    OPTIONS: dict[str, Option]                               what a model spec's "options" may hold
    load(request: LoadRequest) -> LoadedModel                once per model, in a process of its own
    forward(model, ids_BT, start) -> TokenScores             once per batch of windows
    close(model) -> None                                     frees what load() took

and, where they apply, more functions:

    forward_many(model, batches) -> Iterator[TokenScores]    all batches in one submission, in their order
    load_tokenizer(path, trust_remote_code) -> Tokenizer     for data specs whose tokenizer_dir it can read
    predict(request, machine) -> Prediction | None           memory, before the engine starts
    remote_versions(options) -> dict[str, str]               of an engine that runs elsewhere, itself first

A backend that applies LoRA adapters says which features of `evalq.checkpoint.adapter` it gets right beyond
plain LoRA:

    LORA_FEATURES: frozenset[str]                            absent: adapters are refused

It is imported by the command line too (for its options), so it imports its engine inside the functions.
It returns log-probabilities of the target tokens, never logits: an engine without logits (a server, vLLM)
is a full citizen, and nobody holds a float32 [T, V] tensor.

Axes in names: B windows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evalq.checkpoint.adapter import Adapter
from evalq.errors import ModelError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One key of a model spec's "options".

    Args:
        kind: accepted Python types; bool is not an int here.
        help: one line, with the default and how it was chosen.
        choices: accepted values, None for any.
        numeric: changes the log-probabilities by design (dtype, attention kind), so it is part of a
            result's identity. False for how the work is carried out (threads, batch, device).
    """

    kind: tuple[type, ...]
    help: str
    choices: tuple[Any, ...] | None = None
    numeric: bool = False


@dataclass(frozen=True)
class LoadRequest:
    """What a backend is asked to load.

    Args:
        path: a checkpoint directory, or the (first) GGUF file; it exists.
        window_tokens: T of the longest window that will be sent to forward().
        targets_per_window: the most target tokens any window asks for, T - 1 - start.
        options: validated against the backend's OPTIONS.
        trust_remote_code: whether the spec allows code from the checkpoint to run.
        overlay: a second path whose tensors replace those of the first (EXL3 only), or None.
        load_fn: the name the spec used, for backends with several.
        n_windows: how many windows will be scored in all.
        token_ids_max: the largest token id that will be sent.
        adapter: to apply on top; its features are among the backend's LORA_FEATURES.
        divide_work: by how much to divide what is computed at once: 2 after running out of memory.
    """

    path: Path
    window_tokens: int
    targets_per_window: int
    options: dict[str, Any]
    trust_remote_code: bool = False
    overlay: Path | None = None
    load_fn: str = ""
    n_windows: int = 1
    token_ids_max: int = 0
    adapter: Adapter | None = None
    divide_work: int = 1

    def require_directory(self, takes_overlay: bool = False) -> None:
        """Raise ModelError (bad_option) for a file, or for an overlay where none is taken."""
        if self.path.is_file():
            message = f"{self.path.name} is a file, not a checkpoint directory"
            raise ModelError(message, "bad_option", 'use load_fn "gguf"')
        if self.overlay is not None and not takes_overlay:
            raise ModelError("a second model_dir is for EXL3 only", "bad_option")


@dataclass(frozen=True)
class Machine:
    """Where a model would run.

    Args:
        gpus: (name, total GiB) of each, as nvidia-smi says.
        ram_gib: total.
        versions: of the engine's distributions.
    """

    gpus: tuple[tuple[str, float], ...]
    ram_gib: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """What a model would need.

    Args:
        verdict: the outcome with its figures in one line.
        category: of the failure that is certain, None where it fits or may fit.
        memory: as in LoadedModel.memory.
    """

    verdict: str
    category: str | None
    memory: dict[str, float]


@dataclass
class LoadedModel:
    """A model ready to score.

    Args:
        handle: the backend's own; the framework does not look inside.
        vocab_size: number of rows of the head that are real tokens (padding excluded).
        max_positions: the longest input the model's positions allow, None when unlimited.
        device: "cpu", "cuda:0 NVIDIA H200", ...
        dtype: what the arithmetic runs in, "bfloat16", ...
        batch_windows: how many windows forward() wants at once.
        tokenize: text -> ids without special tokens, by the model's own tokenizer; None when it has none.
            Checked against the data spec's tokenizer before anything is scored.
        peak_memory_bytes: most accelerator memory allocated since load() returned; None measures the
            process's resident memory instead.
        versions: what did the work, beyond DISTRIBUTIONS ({"cuda": "13.0"}).
        notes: what a reader of the result should know (numerics other than the format's, engine warnings).
        memory: what the engine says it uses, GiB ("weights_gib", "kv_cache_gib") or as the name says.
    """

    handle: Any
    vocab_size: int
    max_positions: int | None
    device: str
    dtype: str
    batch_windows: int = 1
    tokenize: Callable[[str], list[int]] | None = None
    peak_memory_bytes: Callable[[], int] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Windows of one length that are scored from the same position.

    Args:
        ids_BT: int64 [B, T].
        start: targets are ids_BT[:, start+1:].
    """

    ids_BT: Ids
    start: int


@dataclass(frozen=True)
class TokenScores:
    """Scores of the targets ids_BT[:, start+1:].

    Args:
        logprob: ln P(token | everything before it in its window), nats, float32 [B, T-1-start].
        top1: whether the token is the most probable one, bool of the same shape.
    """

    logprob: NDArray[np.float32]
    top1: NDArray[np.bool_]


class Tokenizer(Protocol):
    """What `load_tokenizer(path)` of a backend that has one returns."""

    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    vocab_size: int

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; `add_special` adds what the tokenizer puts around a text by itself."""
        ...


class Backend(Protocol):
    """What the registry hands out: the three functions above, the table of options, the packages."""

    DISTRIBUTIONS: tuple[str, ...]
    INSTALL: str
    OPTIONS: dict[str, Option]

    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a model. Raises ModelError; any other exception is sorted by `evalq.failures`."""
        ...

    def forward(self, model: LoadedModel, ids_BT: Ids, start: int) -> TokenScores:
        """Score ids_BT[:, start+1:]; position t sees tokens 0..t of its own row only."""
        ...

    def close(self, model: LoadedModel) -> None:
        """Free the model."""
        ...
