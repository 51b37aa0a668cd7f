"""The windows of one evaluation: settings checked, BOS and prefix in place, batches of equal shape.

A plan is plain arithmetic over one token stream; nothing here knows a model, a text or an engine. What each
protocol means is in `evalq.data.protocols`, whose names are offered here too.
"""

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from evalq.data.protocols import (
    HEADS,
    PROTOCOLS,
    BosPolicy,
    Head,
    Protocol,
    ProtocolSettings,
    StreamFacts,
    TextBuilder,
    Window,
)
from evalq.errors import DataError, SpecError

__all__ = [
    "PROTOCOLS",
    "BosPolicy",
    "Head",
    "Protocol",
    "ProtocolSettings",
    "StreamFacts",
    "TextBuilder",
    "Window",
    "WindowPlan",
    "cluster_of",
    "least_clusters",
    "plan_windows",
    "positions_of",
    "protocol_named",
    "stream_special_tokens",
    "stretches",
    "windows_overlap",
]


@dataclass(frozen=True)
class WindowPlan:
    """Every window of one evaluation, in stream order.

    Args:
        protocol: the name in PROTOCOLS.
        windows: at least one, each with at least one target.
        prefix: token ids that windows put before themselves or over their first token.
        mask: which targets count, bool [n_targets]; None where all of them do. Engines score every target,
            and the store keeps them; metrics see those that count.
    """

    protocol: str
    windows: tuple[Window, ...]
    prefix: tuple[int, ...]
    mask: NDArray[np.bool_] | None = None

    @property
    def longest_tokens(self) -> int:
        """T of the longest input, prefix included; its last token is a target only."""
        return max(window.n_ids(len(self.prefix)) for window in self.windows)

    @property
    def n_targets(self) -> int:
        """Tokens scored; one that is scored in several windows counts each time."""
        return sum(window.n_targets for window in self.windows)

    @property
    def n_counted(self) -> int:
        """Targets that count."""
        return self.n_targets if self.mask is None else int(self.mask.sum())

    @property
    def n_inputs(self) -> int:
        """Tokens that are run: all of each window but its last, which is a target only."""
        return sum(window.n_ids(len(self.prefix)) - 1 for window in self.windows)

    @property
    def most_targets(self) -> int:
        """R of the window with the most targets."""
        return max(window.n_targets for window in self.windows)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """Every window as (start, end, score_from, index of its head in HEADS), int64 [W, 4]."""
        rows = [(w.start, w.end, w.score_from, HEADS.index(w.head)) for w in self.windows]
        return np.asarray(rows, np.int64).reshape(-1, 4)

    @cached_property
    def window_of(self) -> NDArray[np.int64]:
        """The window of each scored token, int64 [n_targets]."""
        return np.repeat(np.arange(len(self.windows)), [window.n_targets for window in self.windows])

    @property
    def overlapping(self) -> bool:
        """Whether scores of neighbouring windows depend on each other: they share more than a token."""
        return windows_overlap(self.table[:, 0], self.table[:, 1])

    @cached_property
    def cluster_of(self) -> NDArray[np.int64]:
        """Which tokens that count depend on each other, int64 [n_counted]: `cluster_of` of its table."""
        every = cluster_of(self.table, least_clusters(self.protocol))
        return every if self.mask is None else every[self.mask]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of windows, prefix and mask: two plans with one digest count the same tokens."""
        digest = hashlib.sha256(self.table.astype("<i8").tobytes())
        digest.update(np.asarray(self.prefix, "<i8").tobytes())
        if self.mask is not None:
            digest.update(b"mask" + np.packbits(self.mask).tobytes())
        return digest.hexdigest()

    @property
    def mask_digest(self) -> str | None:
        """SHA-256 (hex) of the mask; None without one."""
        return None if self.mask is None else hashlib.sha256(np.packbits(self.mask).tobytes()).hexdigest()

    def batches(self, batch_windows: int) -> list[list[int]]:
        """Indices of consecutive windows with equal T and equal first target, for one forward() each.

        Args:
            batch_windows: the most windows in a batch, at least 1.

        Returns:
            A partition of range(len(windows)) in order. It depends on the plan and on batch_windows only,
            so a continued run sees the batches that the interrupted one saw.
        """
        if batch_windows < 1:
            raise SpecError(f"batch_windows is {batch_windows}", "set it to 1 or more")
        prefix_len = len(self.prefix)

        def shape(index: int) -> tuple[int, int]:
            window = self.windows[index]
            return window.n_ids(prefix_len), window.first_target(prefix_len)

        groups = [list(same) for _, same in groupby(range(len(self.windows)), key=shape)]
        return [g[i : i + batch_windows] for g in groups for i in range(0, len(g), batch_windows)]


def cluster_of(table: NDArray[np.int64], least: int = 1) -> NDArray[np.int64]:
    """Scored tokens that depend on each other, because they share context or are the same token of the text.

    Windows side by side are clusters themselves. Where neighbours overlap, a token is scored in several of
    them, or scored beside context that another one scores. Then the text between the first and the last
    scored token is cut into equal stretches, each as long as the longest window or a little longer, and
    every score of a token in one stretch belongs to one cluster, in whatever window it was made. So there
    are as many clusters as there would be windows side by side, and errors are those of such windows.

    Args:
        table: windows in stream order as (start, end, score_from, ...), int64 [W, 3 or more].
        least: fewer windows side by side are cut into equal stretches, as few as make so many clusters.

    Returns:
        Names of the clusters, int64 [n], n scored tokens in the order of the windows.
    """
    starts, ends, score_from = table[:, 0], table[:, 1], table[:, 2]
    n_targets = ends - score_from
    window_of = np.repeat(np.arange(len(table), dtype=np.int64), n_targets)
    if not windows_overlap(starts, ends):
        return window_of if least <= len(table) else stretches(window_of, least)
    position = positions_of(table) + starts[window_of]
    first, last = int(score_from.min()), int(ends.max())
    n_stretches = max(1, (last - int(starts.min())) // int((ends - starts).max()))
    found: NDArray[np.int64] = (position - first) * n_stretches // (last - first)
    return found


def positions_of(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of the text that each scored token has before it in its window, int64 [n].

    Args:
        table: windows as for `cluster_of`; what is put before a window is not counted.
    """
    context, n_targets = table[:, 2] - table[:, 0], table[:, 1] - table[:, 2]
    first_of_window = np.cumsum(n_targets) - n_targets
    found: NDArray[np.int64] = np.arange(n_targets.sum()) - np.repeat(first_of_window - context, n_targets)
    return found


def stretches(window_of: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Each window's tokens cut into equal stretches, as few as make `least` of all windows, int64 [n].

    Args:
        window_of: the window of each token, tokens of one window beside each other, [n].
        least: fewer only where there are fewer tokens.
    """
    _, first, sizes = np.unique(window_of, return_index=True, return_counts=True)
    each = -(-least // max(1, sizes.size))
    order = np.argsort(first)
    first, sizes = first[order], sizes[order]
    place = np.arange(window_of.size) - np.repeat(first, sizes)
    found: NDArray[np.int64] = np.repeat(np.arange(sizes.size), sizes) * each + place * each // np.repeat(
        sizes, sizes
    )
    return found


def least_clusters(protocol: str) -> int:
    """How many clusters the errors of a protocol's results are made of at least; of an unknown one 1."""
    return PROTOCOLS[protocol].least_clusters if protocol in PROTOCOLS else 1


def windows_overlap(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
    """Whether neighbouring windows share more tokens than one of context."""
    return bool(np.any(ends[:-1] - starts[1:] > 1))


def protocol_named(name: str) -> Protocol:
    """The protocol of that name. Raises SpecError with the nearest name."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.4)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise SpecError(f'unknown protocol "{name}"', f"{hint}known: {', '.join(PROTOCOLS)}")


def stream_special_tokens(protocol: str, bos: BosPolicy) -> bool:
    """Whether the tokenizer should add its special tokens when it encodes the whole text.

    qbench encodes without; lm-eval puts its own prefix before every document.
    """
    return bos != "never" and protocol_named(protocol).special_tokens


def plan_windows(
    settings: ProtocolSettings, facts: StreamFacts, mask_N: NDArray[np.bool_] | None = None
) -> WindowPlan:
    """The windows that a protocol cuts out of a stream.

    Args:
        settings: the data spec's choice.
        facts: what the tokenizer made of the text.
        mask_N: which tokens of the stream count, bool [N]; None where all do.

    Returns:
        The plan: at least one window, each with at least one target, inside the stream and (lm-eval, chat)
        inside one document. With a mask a window ends with its last target that counts, its first one is
        its first target, and a window in which none counts is left out.

    Raises:
        SpecError: settings that the protocol does not have.
        DataError: the text is too short for them.
    """
    protocol = protocol_named(settings.name)
    _check_settings(settings, protocol)
    needed = protocol.min_tokens(settings.eval_len)
    if facts.n_tokens < needed:
        size = f"text has {facts.n_tokens} tokens"
        if facts.n_tokens < min(settings.eval_len, needed):
            raise DataError(f"{size}, shorter than a window of {settings.eval_len}", _SHORTER)
        raise DataError(f"{size}, {settings.name} with eval_len {settings.eval_len} needs {needed}", _SHORTER)
    head, prefix = _head(settings, facts)
    built = protocol.build(settings, facts)
    if mask_N is not None:
        built = _counted(built, mask_N)
    if not protocol.own_prefix:
        built = (replace(window, head=head) for window in islice(built, settings.max_rows or None))
    windows = tuple(built)
    if not windows:
        raise DataError("no token to score: the documents are empty", "take another text or more max_rows")
    if protocol.exact_rows and len(windows) < (settings.max_rows or 0):
        raise DataError(
            f"text has {len(windows)} windows of {settings.eval_len} tokens, max_rows is {settings.max_rows}",
            f"set max_rows to {len(windows)} or less, or lower eval_len",
        )
    mask = None if mask_N is None else np.concatenate([mask_N[w.score_from : w.end] for w in windows])
    if mask is not None and mask.all():
        mask = None
    return WindowPlan(settings.name, windows, prefix, mask)


def _counted(windows: Iterator[Window], mask_N: NDArray[np.bool_]) -> Iterator[Window]:
    """Windows from their first target that counts to their last: the others need not be scored."""
    for window in windows:
        places = window.score_from + np.flatnonzero(mask_N[window.score_from : window.end])
        if places.size:
            yield replace(window, end=int(places[-1]) + 1, score_from=int(places[0]))


_SHORTER = "take a longer text or lower eval_len in the data spec"


def _check_settings(settings: ProtocolSettings, protocol: Protocol) -> None:
    """Raise SpecError for the first setting that this protocol does not have."""
    name, length = settings.name, settings.eval_len
    if length < protocol.min_eval_len:
        raise SpecError(f"eval_len is {length}", f"{name} needs {protocol.min_eval_len} or more")
    stride = settings.stride
    if stride < 1:
        raise SpecError(
            f"eval_stride is {stride}", f"set it to 1 or more; eval_len ({length}) for no overlap"
        )
    if protocol.fixed_stride and stride != length:
        raise SpecError(
            f"{name} has no eval_stride other than eval_len ({length}), got {stride}", "remove it"
        )
    if not protocol.gaps and stride > length:
        raise SpecError(
            f"eval_stride {stride} is longer than eval_len {length}: tokens between them are left out",
            "set eval_stride to eval_len or less",
        )
    if settings.max_rows is not None and settings.max_rows < 0:
        raise SpecError(f"max_rows is {settings.max_rows}", "set it to 0 for all windows, or to 1 or more")
    warmup = settings.warmup_tokens
    if warmup < 0 or (warmup and warmup >= length - 1):
        raise SpecError(
            f"warmup_tokens is {warmup}", f"0 to {length - 2} leave a target in a window of {length}"
        )
    if warmup and not protocol.warmup:
        known = ", ".join(n for n, p in PROTOCOLS.items() if p.warmup)
        raise SpecError(f"{name} has no warmup_tokens", f"remove it; protocols that have it: {known}")
    if (protocol.own_prefix or protocol.own_start) and (settings.bos != "default" or settings.prefix_ids):
        what = "prefix_ids" if settings.prefix_ids else f'bos "{settings.bos}"'
        raise SpecError(f"{name} puts its own prefix before every document, got {what}", "remove it")


def _head(settings: ProtocolSettings, facts: StreamFacts) -> tuple[Head, tuple[int, ...]]:
    """What every window does with its first token, and the prefix ids of the plan.

    lm-eval's windows already say which of them take the prefix, which is BOS, or EOS where there is none.
    """
    protocol = protocol_named(settings.name)
    if protocol.own_prefix:
        prefix_id = facts.eos_id if facts.bos_id is None else facts.bos_id
        if prefix_id is None:
            raise SpecError(
                "the tokenizer has neither BOS nor EOS",
                f"{settings.name} needs one: take another protocol",
            )
        return "keep", (prefix_id,)
    by_default = protocol.bos_first and settings.bos == "default" and facts.adds_bos
    if settings.bos != "every_window" and not by_default:
        return ("prepend", settings.prefix_ids) if settings.prefix_ids else ("keep", ())
    if facts.bos_id is None:
        raise SpecError('bos "every_window", but the tokenizer has no BOS token', 'set bos to "never"')
    if settings.prefix_ids:
        raise SpecError(
            "BOS would overwrite the token after prefix_ids in every window",
            'set bos to "never" and begin prefix_ids with BOS',
        )
    return "overwrite", (facts.bos_id,)
