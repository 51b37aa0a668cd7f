"""The perplexity protocols: which windows each public tool cuts out of a token stream, and `long`.

N = tokens in the stream, L = window length (`eval_len`), S = stride (`eval_stride`). Stream positions count
from 0 and ranges exclude their end. A token is scored when the model is asked for its log-probability given
the tokens before it in its window, so the first token of an input can only ever be context.

A builder is the bare arithmetic of one tool; `evalq.data.windows.plan_windows` checks the settings, puts BOS
or a prefix in and is what callers use. `Protocol.source` is where the tool's own code can be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from evalq.engine.backend import Ids

BosPolicy = Literal["default", "never", "every_window"]
Head = Literal["keep", "prepend", "overwrite"]
HEADS: tuple[Head, ...] = ("keep", "prepend", "overwrite")
# Fewer make rough errors, and 95% intervals that are several times as wide as with many.
LEAST_CLUSTERS = 8
TextBuilder = Literal["joined", "joined-nonblank", "file", "documents"]


@dataclass(frozen=True, slots=True)
class Window:
    """stream[start:end], with scores kept for stream positions score_from .. end-1.

    Args:
        start: first stream position of the input.
        end: one past its last stream position.
        score_from: first scored stream position; equal to `start` only where a prefix is put before it.
        head: what the plan's prefix ids do to this window: "keep" nothing, "prepend" go before it,
            "overwrite" the one prefix id replaces stream[start] (context only, never scored).
    """

    start: int
    end: int
    score_from: int
    head: Head = "keep"

    @property
    def n_targets(self) -> int:
        """Tokens scored in this window."""
        return self.end - self.score_from

    def n_ids(self, prefix_len: int) -> int:
        """T, the length of ids(), with a prefix of that many tokens."""
        return self.end - self.start + (prefix_len if self.head == "prepend" else 0)

    def first_target(self, prefix_len: int) -> int:
        """Index in ids() of the first scored token, at least 1; the backend's `start` is this minus 1."""
        return self.score_from - self.start + (prefix_len if self.head == "prepend" else 0)

    def ids(self, stream_N: Ids, prefix: Ids) -> Ids:
        """The model's input, int64 [T].

        Args:
            stream_N: the whole token stream, int64 [N].
            prefix: the plan's prefix ids, int64 [P]; P = 1 for a window that overwrites.
        """
        body = np.asarray(stream_N[self.start : self.end], dtype=np.int64)
        if self.head == "prepend":
            return np.concatenate([np.asarray(prefix, dtype=np.int64), body])
        if self.head == "overwrite":
            assert len(prefix) == 1, "exactly one token can replace the first one"
            body = body.copy()
            body[0] = prefix[0]
        return body


@dataclass(frozen=True)
class StreamFacts:
    """What the tokenizer said about itself and the stream.

    Args:
        n_tokens: N, special tokens that the tokenizer added included.
        document_ends: one past the last token of each document, ascending, the last one N; empty for one
            document.
        bos_id: beginning-of-sequence token, or None.
        eos_id: end-of-sequence token, or None.
        adds_bos: the tokenizer puts BOS before a text by itself.
    """

    n_tokens: int
    document_ends: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False


@dataclass(frozen=True)
class ProtocolSettings:
    """A data spec's choice of protocol.

    Args:
        name: a key of PROTOCOLS.
        eval_len: L, tokens.
        eval_stride: S, tokens; None takes the protocol's default.
        max_rows: the most windows (lm-eval: documents); None or 0 is all of them.
        bos: "default" is what the protocol's tool does; "never" leaves BOS out; "every_window" overwrites
            the first token of every window with BOS.
        warmup_tokens: further leading tokens of every window that are context only.
        prefix_ids: tokens put before every window and never scored, such as a chat template's opening.
    """

    name: str
    eval_len: int
    eval_stride: int | None = None
    max_rows: int | None = None
    bos: BosPolicy = "default"
    warmup_tokens: int = 0
    prefix_ids: tuple[int, ...] = ()

    @property
    def stride(self) -> int:
        """S: as set, else the protocol's own or L, whichever is shorter."""
        if self.eval_stride is not None:
            return self.eval_stride
        return min(PROTOCOLS[self.name].default_eval_stride or self.eval_len, self.eval_len)


Builder = Callable[[ProtocolSettings, StreamFacts], Iterator[Window]]


@dataclass(frozen=True)
class Protocol:
    """One published way to measure perplexity.

    Args:
        build: yields its windows in stream order, leaving BOS, prefix_ids and (lm-eval excepted) max_rows
            to plan_windows.
        min_tokens: L -> the smallest N with enough windows.
        text: how the data set's rows become the text, see `evalq.data.rows`.
        default_eval_len: L of the tool.
        default_eval_stride: S of the tool; None is L.
        unit: what its headline perplexity is per.
        help: one line.
        source: where the tool's own code is.
        fixed_stride: S other than L would be another protocol.
        gaps: whether S may be longer than L, which leaves tokens between windows out.
        warmup: whether the tool knows warmup_tokens.
        min_eval_len: the smallest L with a target.
        special_tokens: whether the tokenizer adds its special tokens to the text as a whole.
        own_prefix: windows say themselves which of them take a prefix (BOS, or EOS without one), and max_rows
            counts documents; no other BOS policy or prefix fits it.
        own_start: a document begins as the tokenizer wrote it: no BOS policy or prefix fits it.
        bos_first: BOS overwrites the first token of every window where the tokenizer adds one.
        exact_rows: fewer windows than max_rows are an error.
        scores_all: every token of the text is scored once, so totals per byte and word are exact.
        least_clusters: windows are cut into equal stretches until there are so many for the errors; 1 leaves
            them whole.
        in_steps: windows are so long that an engine may take them in steps, see `evalq.run.steps`.
    """

    build: Builder
    min_tokens: Callable[[int], int]
    text: TextBuilder | Literal["conversations"]
    default_eval_len: int
    default_eval_stride: int | None
    unit: Literal["token", "word"]
    help: str
    source: str
    fixed_stride: bool = False
    gaps: bool = True
    warmup: bool = False
    min_eval_len: int = 2
    special_tokens: bool = True
    own_prefix: bool = False
    own_start: bool = False
    bos_first: bool = False
    exact_rows: bool = False
    scores_all: bool = False
    least_clusters: int = 1
    in_steps: bool = False


def _sliding(settings: ProtocolSettings, facts: StreamFacts) -> Iterator[Window]:
    """Starts range(0, N - L, S), so a last window that fits exactly is left out; all L - 1 targets.

    With w = warmup_tokens the targets are window positions w+1 .. L-1.
    """
    length = settings.eval_len
    for start in range(0, facts.n_tokens - length, settings.stride):
        yield Window(start, start + length, start + settings.warmup_tokens + 1)


def _strided(settings: ProtocolSettings, facts: StreamFacts) -> Iterator[Window]:
    """Starts 0, S, 2S, ... until a window ends with the stream; only targets that no window scored before.

    With S < L every token but the first is scored exactly once. With S = L the first token of a window
    has no context, in the tool as here, so it is left out.
    """
    scored_to = 0
    for start in range(0, facts.n_tokens, settings.stride):
        end = min(start + settings.eval_len, facts.n_tokens)
        score_from = max(scored_to, start + 1)
        # Past the window that ends with the stream nothing is left to score, so no window follows it.
        if score_from < end:
            yield Window(start, end, score_from)
        scored_to = end


def _disjoint(
    settings: ProtocolSettings, facts: StreamFacts, *, context_share: int | None
) -> Iterator[Window]:
    """N // L windows side by side.

    Args:
        settings: L.
        facts: N.
        context_share: the first L // context_share tokens are context beyond the first; None for none.
    """
    length = settings.eval_len
    context = length // context_share if context_share else 0
    for start in range(0, facts.n_tokens // length * length, length):
        yield Window(start, start + length, start + context + 1)


def _rolling(settings: ProtocolSettings, facts: StreamFacts) -> Iterator[Window]:
    """Every token of every document once, inputs of M = eval_len tokens, so T = M + 1 with the last target.

    The first window of a document is the prefix and its first M tokens. A later window has one token of
    context and M targets; the last one, when fewer are left, keeps T = M + 1 and has more context.
    """
    longest = settings.eval_len
    ends = facts.document_ends or (facts.n_tokens,)
    assert ends[-1] == facts.n_tokens, "the last document ends with the stream"
    documents = list(zip((0, *ends[:-1]), ends, strict=True))
    for begin, end in documents[: settings.max_rows or None]:
        if begin == end:
            continue
        scored_to = min(begin + longest, end)
        yield Window(begin, scored_to, begin, "prepend")
        while scored_to < end:
            stop = min(scored_to + longest, end)
            yield Window(stop - longest - 1, stop, scored_to)
            scored_to = stop


def _long(settings: ProtocolSettings, facts: StreamFacts) -> Iterator[Window]:
    """Each document from its start in windows of L side by side, the last of them as long as what is left.

    Every token is scored that has one before it in its window.
    """
    begin = 0
    for end in facts.document_ends or (facts.n_tokens,):
        for start in range(begin, end - 1, settings.eval_len):
            yield Window(start, min(start + settings.eval_len, end), start + 1)
        begin = end


def _conversations(settings: ProtocolSettings, facts: StreamFacts) -> Iterator[Window]:
    """A document a window, cut at its end where it is longer than L. Its first token is context."""
    begin = 0
    for end in facts.document_ends or (facts.n_tokens,):
        if end - begin > 1:
            yield Window(begin, min(begin + settings.eval_len, end), begin + 1)
        begin = end


_EXLLAMAV3 = "https://github.com/turboderp-org/exllamav3/blob/master/eval/"

PROTOCOLS: dict[str, Protocol] = {
    "exllamav3": Protocol(
        build=_sliding,
        min_tokens=lambda length: length + 1,
        text="joined",
        default_eval_len=2048,
        default_eval_stride=512,
        unit="token",
        help="exllamav3's compare_q: overlapping windows, every target of each",
        source=_EXLLAMAV3 + "compare_q.py",
        warmup=True,
    ),
    "qbench": Protocol(
        build=_sliding,
        min_tokens=lambda length: length + 1,
        text="joined-nonblank",
        default_eval_len=2048,
        default_eval_stride=None,
        unit="token",
        help="exllamav3's qbench: windows side by side, no BOS, blank rows left out",
        source=_EXLLAMAV3 + "qbench/data.py",
        warmup=True,
        special_tokens=False,
        exact_rows=True,
    ),
    "hf-strided": Protocol(
        build=_strided,
        min_tokens=lambda length: 2,
        text="joined",
        default_eval_len=2048,
        default_eval_stride=512,
        unit="token",
        help="transformers' guide: sliding window, each token scored once with long context",
        source="https://huggingface.co/docs/transformers/perplexity",
        gaps=False,
    ),
    "gptq": Protocol(
        build=partial(_disjoint, context_share=None),
        min_tokens=lambda length: length,
        text="joined",
        default_eval_len=2048,
        default_eval_stride=None,
        unit="token",
        help="GPTQ, AWQ and SpinQuant papers: windows of 2048 side by side",
        source="https://github.com/IST-DASLab/gptq/blob/main/llama.py",
        fixed_stride=True,
    ),
    "llama.cpp": Protocol(
        build=partial(_disjoint, context_share=2),
        min_tokens=lambda length: 2 * length,
        text="file",
        default_eval_len=512,
        default_eval_stride=None,
        unit="token",
        help="llama-perplexity: windows side by side, the second half of each is scored",
        source="https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp",
        fixed_stride=True,
        min_eval_len=3,
        bos_first=True,
    ),
    "lm-eval": Protocol(
        build=_rolling,
        min_tokens=lambda length: 1,
        text="documents",
        default_eval_len=2048,
        default_eval_stride=None,
        unit="word",
        help="lm-evaluation-harness, task wikitext: whole pages, perplexity per word",
        source="https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/utils.py",
        fixed_stride=True,
        special_tokens=False,
        own_prefix=True,
        scores_all=True,
    ),
    "long": Protocol(
        build=_long,
        min_tokens=lambda length: 2,
        text="joined",
        default_eval_len=8192,
        default_eval_stride=None,
        unit="token",
        help="long context: a document to its end in long windows, perplexity by position in them",
        source="https://arxiv.org/abs/2001.08361",
        fixed_stride=True,
        bos_first=True,
        least_clusters=LEAST_CLUSTERS,
        in_steps=True,
    ),
    "chat": Protocol(
        build=_conversations,
        min_tokens=lambda length: 2,
        text="conversations",
        default_eval_len=4096,
        default_eval_stride=None,
        unit="token",
        help="conversations by the model's own chat template: a window each, the assistant's tokens count",
        source="https://huggingface.co/docs/transformers/chat_templating",
        fixed_stride=True,
        special_tokens=False,
        own_start=True,
    ),
}
