"""The contract between the framework and an engine: subclass `Backend` and name the class in an entry point.

    class MyEngine(Backend):
        distributions = ("myengine",)                      its packages, the engine first ("a|b": either)
        install = "pip install myengine"                   the command that installs them
        options = {"dtype": Option((str,), "...")}         what a model spec's "options" may hold
        columns = (LOGPROB, TOP1)                          what it can say about each scored token

        def load(self, request): ...                       once per model, in a process of its own
        def score(self, model, batches): ...               batches in, named arrays out, in their order
        def close(self, model): ...                        frees what load() took

    and, with `generates = True`, where it can continue a prompt

        def generate(self, model, prompts, new_tokens, stop_ids): ...

Everything else has a default that says "not offered". The class is imported by the command line too (for its
options), so it imports its engine inside its methods. Scores are numbers per token, never logits: an engine
without logits (a server, vLLM) is a full citizen, and nobody holds a float32 [T, V] tensor.

Axes in names: B windows of a batch, T tokens of a window, R targets of a window, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evalq.checkpoint.adapter import Adapter
from evalq.engine.columns import DEFAULT_COLUMNS, LOGPROB, TOP1, Column
from evalq.engine.experts import TakeExpertTokens
from evalq.engine.kv_cache import CacheTypes, KvCache, cache_of
from evalq.engine.reference import ReferenceHead
from evalq.errors import ModelError

# The option of engines that can put noise into every layer, for a noise floor.
LAYER_NOISE = "layer_noise"
Ids = NDArray[np.int64]
Scores = dict[str, NDArray[Any]]  # column name -> [B, R]


@dataclass(frozen=True)
class Option:
    """One key of a model spec's "options".

    Args:
        kind: accepted Python types; bool is not an int here.
        help: one line, with the default and how it was chosen.
        choices: accepted values, None for any.
        numeric: changes the log-probabilities by design (dtype, attention kind), so it is part of a
            result's identity. False for how the work is carried out (threads, batch, device).
        minimum: the smallest number accepted, None for any.
        canonical: a value of the right kind -> the one way it is written in identities, None where it says
            no more than leaving it out; raises ValueError with what is wrong and what is accepted.
    """

    kind: tuple[type, ...]
    help: str
    choices: tuple[Any, ...] | None = None
    numeric: bool = False
    minimum: float | None = None
    canonical: Callable[[Any], Any] | None = None


def kv_cache_option(types: CacheTypes) -> Option:
    """The option "kv_cache" of an engine with these types."""
    return Option((str,), types.help, numeric=True, canonical=types.canonical)


@dataclass(frozen=True)
class LoadRequest:
    """What a backend is asked to load.

    Args:
        path: a checkpoint directory, or the (first) GGUF file; it exists.
        window_tokens: T of the longest window that will be sent to score().
        targets_per_window: R, the most targets that any window has.
        options: validated against the backend's options.
        trust_remote_code: whether the spec allows code from the checkpoint to run.
        overlay: a second path whose tensors replace those of the first (EXL3 only), or None.
        load_fn: the name the spec used, for backends with several.
        n_windows: how many windows will be scored in all; 0 for a model that only generates.
        n_targets: how many targets they have in all.
        token_ids_max: the largest token id that will be sent.
        adapter: to apply on top; its features are among the backend's lora_features.
        divide_work: by how much to divide what is computed at once: 2 after running out of memory.
        columns: names of the columns that will be asked for.
        reference: the head of the model that this one is compared with, for columns beside it.
        generate: how many prompts at once will be sent to generate(); 0 for none.
        prompt_tokens: the most tokens that one of them has.
        new_tokens: how many tokens will be asked for.
        step_tokens: at most so many tokens of a window in one forward pass, through the engine's KV cache, so
            that later steps read what earlier ones wrote; None leaves it to the engine.
    """

    path: Path
    window_tokens: int
    targets_per_window: int
    options: dict[str, Any]
    trust_remote_code: bool = False
    overlay: Path | None = None
    load_fn: str = ""
    n_windows: int = 1
    n_targets: int = 0
    token_ids_max: int = 0
    adapter: Adapter | None = None
    divide_work: int = 1
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    reference: ReferenceHead | None = None
    generate: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    step_tokens: int | None = None

    @property
    def only_generates(self) -> bool:
        """Whether it will only continue prompts: an engine may then be set up as it is where it serves."""
        return self.generate > 0 and self.n_windows == 0

    @property
    def longest_tokens(self) -> int:
        """The most tokens that one sequence will have: a window, or a prompt with what is generated."""
        return max(0 if self.only_generates else self.window_tokens, self.prompt_tokens + self.new_tokens)

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
        batch_windows: how many windows score() wants in a batch.
        tokenize: text -> ids without special tokens, by the model's own tokenizer; None when it has none.
            Checked against the data spec's tokenizer before anything is scored.
        peak_memory_bytes: most accelerator memory allocated since load() returned; None measures the
            process's resident memory instead.
        reset_peak_memory: counts it from now on; called before each text. None where that cannot be, so that
            the peak of a text is that of those before it too.
        versions: what did the work, beyond the backend's distributions ({"cuda": "13.0"}).
        notes: what a reader of the result should know (numerics other than the format's, engine warnings).
        memory: what the engine says it uses, GiB ("weights_gib", "kv_cache_gib") or as the name says.
        columns: names of the columns this model gives; None for all that the backend declares.
        warm_up: how many batches take longer at first than the same work later (kernels are compiled or
            chosen, memory is taken); the first ones are scored once beforehand, and that is not counted in
            tokens per second. True is 1.
        setup_seconds: time that score() spent on work it does once (recording a graph), which is not counted
            in tokens per second; score() adds to it.
        reference_head: how its distributions are kept, where `REFERENCE_ROWS` are asked for and it has them.
        expert_tokens: how many tokens its routers sent to each expert since it was last asked; None for a
            model without experts, or where the engine does not show them.
        kv_bits: per element of the KV cache, where the engine's own is not of the type of its arithmetic.
    """

    handle: Any
    vocab_size: int
    max_positions: int | None
    device: str
    dtype: str
    batch_windows: int = 1
    tokenize: Callable[[str], list[int]] | None = None
    peak_memory_bytes: Callable[[], int] | None = None
    reset_peak_memory: Callable[[], None] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    warm_up: int = 0
    setup_seconds: float = 0.0
    reference_head: ReferenceHead | None = None
    expert_tokens: TakeExpertTokens | None = None
    kv_bits: float | None = None


@dataclass(frozen=True)
class Generated:
    """What a model puts after some prompts.

    Args:
        ids: new tokens of each prompt, in the order of the prompts, int64 [N]; a stop token that was met is
            the last one.
        first_token_seconds: until every prompt had its first new token.
        seconds: until all of them were there.
    """

    ids: list[Ids]
    first_token_seconds: float
    seconds: float


class Inputs(Mapping[str, NDArray[Any]]):
    """What columns of a batch need beside its ids, read when it is asked for."""

    def prefetch(self) -> None:
        """Start to read it, for a batch that is scored next."""
        return


@dataclass(frozen=True)
class Batch:
    """Windows of one length that are scored from the same position.

    Args:
        ids_BT: int64 [B, T].
        first_target: index of the first scored token, at least 1.
        columns: names of the columns wanted.
        inputs: what these columns need beside the ids (`Column.needs`), by name, [B, R, ...]; "reference":
            rows of the reference as `evalq.engine.reference` keeps them.
    """

    ids_BT: Ids
    first_target: int
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def targets_BR(self) -> Ids:
        """The scored tokens, int64 [B, R]."""
        return self.ids_BT[:, self.first_target :]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, R): of every array of scores."""
        n_windows, n_targets = self.targets_BR.shape
        return n_windows, n_targets


def check_generation(
    prompts: Sequence[Ids], new_tokens: int, max_positions: int | None, vocab_size: int | None = None
) -> None:
    """Raise ModelError unless these prompts can be continued.

    Args:
        prompts: as in `Backend.generate`.
        new_tokens: likewise.
        max_positions: of the model, None for any.
        vocab_size: likewise.
    """
    if new_tokens < 1:
        raise ModelError(f"{new_tokens} new tokens were asked for, at least 1 is needed", "bad_option")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ModelError("a prompt has no tokens, at least 1 is needed", "bad_option")
    # The last new token is never fed back, so it takes no position.
    needed = max((len(prompt) for prompt in prompts), default=0) + new_tokens - 1
    if max_positions is not None and needed > max_positions:
        raise ModelError(
            f"a prompt and its new tokens need {needed} positions, the model has {max_positions}",
            "window_too_long",
            "take a shorter prompt or fewer new tokens",
        )
    largest = max((int(prompt.max()) for prompt in prompts), default=0)
    if vocab_size is not None and largest >= vocab_size:
        message = f"a prompt has token id {largest}, the model's vocabulary has {vocab_size}"
        raise ModelError(message, "tokenizer_mismatch")


def reading_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; while one is scored, what the next one needs is read."""
    left = iter(batches)
    current = next(left, None)
    while current is not None:
        following = next(left, None)
        if following is not None and isinstance(following.inputs, Inputs):
            following.inputs.prefetch()
        yield current
        current = following


@dataclass(frozen=True)
class Piece:
    """What a token writes.

    Args:
        text: its bytes; of a special token its name, which a text may hold.
        special: it may stand for nothing in the text.
    """

    text: bytes
    special: bool = False


class Tokenizer(ABC):
    """What `load_tokenizer(path)` of a backend that has one returns.

    Attributes:
        bos_id: beginning-of-sequence token, or None.
        eos_id: end-of-sequence token, or None.
        adds_bos: whether it puts BOS before a text by itself.
        vocab_size: number of ids.
        stop_ids: tokens that end an answer, where the checkpoint says so; its EOS among them.
    """

    stop_ids: frozenset[int] = frozenset()
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    vocab_size: int

    @abstractmethod
    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; `add_special` adds what the tokenizer puts around a text by itself."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included; the ids themselves where an engine does not say."""
        return "".join(f"<{token}>" for token in ids)

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """What each id writes, a leading space included. Raises ModelError where that cannot be told."""
        raise ModelError("this tokenizer does not tell the bytes of its tokens", "tokenizer_mismatch")

    def chat_prefix(self) -> list[int]:
        """Ids of the opening of a chat, by the tokenizer's own template. Raises ModelError without one."""
        raise ModelError("this tokenizer has no chat template", "tokenizer_mismatch", "remove chat_template")

    def chat_text(self, messages: Sequence[Mapping[str, str]], opening: bool = False) -> str:
        """A conversation as the tokenizer's own chat template renders it.

        Args:
            messages: its turns, each with "role" and "content".
            opening: whether the start of the assistant's next turn follows.

        Raises:
            ModelError: there is no template; any other exception is the template's own.
        """
        raise ModelError("there is no chat template", "tokenizer_mismatch", NO_TEMPLATE)

    def chat_answers(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int]] | None:
        """Start and end of what the template itself marks as the assistant's, in characters of chat_text().

        None where it marks nothing, as most templates do.
        """
        return None

    def encode_chat(self, text: str) -> "Encoded":
        """Ids of a rendered conversation, nothing added, and where they stand. Raises ModelError."""
        raise ModelError(
            "this tokenizer does not say where its tokens stand in a text",
            "tokenizer_mismatch",
            "set tokenizer_dir to a directory with a tokenizer.json",
        )


NO_TEMPLATE = (
    "set tokenizer_dir to the instruct model of this family, or score a plain text with another protocol"
)


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation as tokens.

    Args:
        ids: [T].
        spans: where each stands in the text, start and end in characters, [T].
        is_control: whether it is a control token, such as one that ends a turn, [T].
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    is_control: list[bool]


class Backend(ABC):
    """An engine. One object serves every model that names it; what a model needs is in its LoadedModel."""

    distributions: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    columns: ClassVar[tuple[Column, ...]] = (LOGPROB, TOP1)
    # Features of `evalq.checkpoint.adapter` that it gets right beyond plain LoRA; None applies no adapters.
    lora_features: ClassVar[frozenset[str] | None] = None
    # Other backends whose loaded models it can score ("fwd_fn" beside another "load_fn").
    scores_for: ClassVar[frozenset[str]] = frozenset()
    has_tokenizer: ClassVar[bool] = False
    # Whether generate() can do more than refuse.
    generates: ClassVar[bool] = False
    # Whether it is set up in another way for generating than for scoring: one load does not show both speeds.
    generates_apart: ClassVar[bool] = False

    @abstractmethod
    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a model. Raises ModelError; any other exception is sorted by `evalq.engine.failures`."""

    @abstractmethod
    def score(self, model: LoadedModel, batches: Iterable[Batch]) -> Iterator[Scores]:
        """For each batch, in order, an array [B, R] for every column it asks for.

        A target sees the tokens before it in its own window only.

        Raises:
            ModelError: the engine cannot score a batch.
        """

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Ids],
        new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """Continue prompts by the most probable token each time (greedy decoding), through the KV cache.

        Nothing else decides: no sampling, no penalty, no stop token of the checkpoint's own settings. How a
        prompt goes on does not depend on the other prompts, but for rounding.

        Args:
            model: loaded with room for it (`LoadRequest.generate`, `prompt_tokens`, `new_tokens`).
            prompts: int64 [N] of each, at least one token; lengths may differ.
            new_tokens: at most so many for each, at least 1.
            stop_ids: tokens after which a continuation ends; empty for continuations of `new_tokens` each.

        Raises:
            ModelError: bad_option, where this engine does not generate; window_too_long, where a prompt and
                its new tokens are more than the model's positions.
        """
        name = type(self).__name__.removesuffix("Backend").lower()
        raise ModelError(f"{name} does not generate here", "bad_option")

    @abstractmethod
    def close(self, model: LoadedModel) -> None:
        """Free the model."""

    def kv_cache(self, options: Mapping[str, Any]) -> KvCache | None:
        """Types of the cached keys and values that checked options name; None for the engine's own."""
        return cache_of(options)

    def score_other_cache(self, model: LoadedModel, batch: Batch) -> Scores | None:
        """Score a batch as score() does, in the same steps, with other numbers in the KV cache.

        Unquantized ones, or, where the engine cannot hold both, none. Scores that are the same bit for bit
        show that the cache is not read. Asked of models with a quantized cache, before anything is scored.

        Returns:
            As score(); None where the engine cannot tell, which the record then says.
        """
        return None

    def load_tokenizer(self, path: Path, trust_remote_code: bool = False) -> Tokenizer:
        """The tokenizer at `path`, where has_tokenizer says that there are some. Raises ModelError."""
        message = f"{type(self).__name__} has no tokenizers"
        raise ModelError(message, "tokenizer_mismatch", "set tokenizer_dir in the data spec")

    def predict(self, request: LoadRequest, machine: Machine) -> Prediction | None:
        """Memory that the model would need, before the engine starts; None where that cannot be told."""
        return None

    def reads(self, weights: str) -> str | None:
        """Whether it reads safetensors or GGUF weights of a format, for the table of `evalq inspect`.

        Args:
            weights: as `evalq.inspect.engines.weight_format` names them: "plain", "GGUF", "INT4", "FP8",
                "FP8 block", "NVFP4", "GPTQ", "AWQ", "bitsandbytes", "EXL3", ...

        Returns:
            "" for yes, else why not in a few words; None where it does not say.
        """
        return None

    def remote_versions(self, options: Mapping[str, Any]) -> dict[str, str] | None:
        """Versions of an engine that runs elsewhere, itself first; None for one that runs here.

        Asked for when a model is prepared, and again before and after it is scored: a change in between is
        an error.
        """
        return None
