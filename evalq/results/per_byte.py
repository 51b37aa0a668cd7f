"""Bits per byte of models with different tokenizers, on one text.

Perplexities per token of different tokenizers measure other things. Bits per byte do not: how many bits a
model needs for the text, divided by the text's bytes. Convention: x_i = -ln P(token i | context) in nats and
b_i the bytes of the text that token i stands for (`evalq.data.token_bytes`), over all scored tokens,

    bits per byte = sum x_i / (ln 2 * sum b_i)

so each model's is over the bytes that it scored: where windows end depends on the tokenizer. Windows are of
`eval_len` tokens of each model's own tokenizer, so the longer its tokens, the more text a model sees in one.

Two models share no tokens, but they share the text. So they are compared on the bytes that both scored,
cut into stretches of equal bytes, as many as the model with fewer windows has, and each is a cluster: what is
hard for both in a stretch cancels, as it does token by token for models of one tokenizer. The error is by the
delta method. With X = sum x and B = sum b, a token moves ln(X/B) by x_i/X - b_i/B; a stretch moves ln of the
ratio of two models by the sum of these over the model's tokens in it minus that over the reference's.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalq.engine.columns import LOGPROB
from evalq.results.estimate import Estimate
from evalq.results.record import BYTE_LN_RATIO, AgainstReference, ResultRecord
from evalq.results.reference import clusters_of
from evalq.results.statistics import LOG, PLAIN, Clusters, Float64s, Scale, exp, interval, require_finite
from evalq.results.tokens import TokenColumns

LN2 = math.log(2)


@dataclass(frozen=True)
class ByteScores:
    """A model's finite scores along a text.

    Args:
        nats: x, [n].
        n_bytes: b, [n].
        at: first byte of each token in the text, int64 [n].
        names: of the cluster of each token: its window, or a stretch of windows that overlap, int64 [n].
    """

    nats: Float64s
    n_bytes: Float64s
    at: NDArray[np.int64]
    names: NDArray[np.int64]

    @classmethod
    def of(
        cls, found: TokenColumns, bytes_N: NDArray[np.int64], protocol: str, text_bytes: int | None = None
    ) -> "ByteScores":
        """Scores with the bytes of their tokens.

        Args:
            found: columns of the result; it says where its windows lie.
            bytes_N: of every token of the stream, int64 [N].
            protocol: of the result.
            text_bytes: of the text as it was before it was rewritten for scoring (lm-eval counts those).

        Raises:
            ModelError: category "non_finite", when too many scores are not finite.
        """
        assert found.windows is not None, "results of evalq 0.1 are scored again before they come here"
        positions = np.concatenate([np.arange(row[2], row[1]) for row in found.windows])
        nats = -found.columns[LOGPROB.name].astype(np.float64)
        finite = np.isfinite(nats)
        require_finite(nats.size, nats.size - int(finite.sum()))
        starts, scored = np.cumsum(bytes_N) - bytes_N, bytes_N[positions]
        rewritten = 1.0 if text_bytes is None else text_bytes / int(scored.sum())
        names = clusters_of(found, protocol)[finite]
        return cls(nats[finite], scored[finite] * rewritten, starts[positions][finite], names)

    def within(self, low: int, high: int) -> "ByteScores":
        """Those of tokens that begin in a range of bytes."""
        kept = (self.at >= low) & (self.at < high)
        return ByteScores(self.nats[kept], self.n_bytes[kept], self.at[kept], self.names[kept])

    @cached_property
    def clusters(self) -> Clusters:
        """Which tokens depend on each other."""
        return Clusters.named(self.names)

    @property
    def bytes_scored(self) -> int:
        """Sum b; a byte that is scored in several windows counts each time."""
        return round(float(self.n_bytes.sum()))

    @property
    def end(self) -> int:
        """Of the last token, in bytes of the text."""
        last = int(self.at.argmax())
        return int(self.at[last]) + max(1, round(float(self.n_bytes[last])))

    @cached_property
    def bits_per_byte(self) -> float:
        """Sum x / (ln 2 sum b)."""
        return float(self.nats.sum() / (LN2 * self.n_bytes.sum()))

    @cached_property
    def influence(self) -> Float64s:
        """How much each token moves ln(bits per byte), [n]; they sum to zero."""
        found: Float64s = self.nats / self.nats.sum() - self.n_bytes / self.n_bytes.sum()
        return found

    @cached_property
    def relative_stderr(self) -> float | None:
        """Standard error of ln(bits per byte), clustered by the model's own windows."""
        return self.clusters.stderr(self.influence * self.nats.size)

    def estimates(self) -> dict[str, Estimate]:
        """Bits per byte, and the perplexity per byte, 2 to the power of it."""
        bits, error = self.bits_per_byte, self.relative_stderr
        byte_ppl = exp(bits * LN2)
        return {
            "bits_per_byte": self._estimate(bits, error and error * bits, PLAIN),
            "byte_ppl": self._estimate(byte_ppl, error and error * bits * LN2 * byte_ppl, LOG),
        }

    def _estimate(self, value: float, stderr: float | None, scale: Scale) -> Estimate:
        return _estimate(value, stderr, self.clusters, scale)


def ln_ratio(mine: ByteScores, reference: ByteScores) -> Estimate | None:
    """ln(bits per byte / bits per byte of the reference) on the bytes that both scored; None without any.

    Its error is by stretches of the text.
    """
    low = max(int(mine.at.min()), int(reference.at.min()))
    high = min(mine.end, reference.end)
    mine, reference = mine.within(low, high), reference.within(low, high)
    if not mine.n_bytes.sum() or not reference.n_bytes.sum():
        return None
    value = math.log(mine.bits_per_byte / reference.bits_per_byte)
    n_stretches = min(mine.clusters.count, reference.clusters.count)
    of_mine, of_reference = ((one.at - low) * n_stretches // (high - low) for one in (mine, reference))
    stretches = Clusters.named(np.concatenate([of_mine, of_reference]))
    moved = np.bincount(of_mine, mine.influence, n_stretches) - np.bincount(
        of_reference, reference.influence, n_stretches
    )
    error = None
    if stretches.count > 1:
        error = math.sqrt(stretches.count / (stretches.count - 1) * float(np.square(moved).sum()))
    return _estimate(value, error, stretches, PLAIN)


def _estimate(value: float, stderr: float | None, clusters: Clusters, scale: Scale) -> Estimate:
    kept = stderr if stderr is not None and math.isfinite(stderr) else None
    ends = interval(value, kept, clusters.t if clusters.count > 1 else 0.0, scale) or (None, None)
    return Estimate(value=value, stderr=kept, low=ends[0], high=ends[1])


# Facts of a comparison that depend on the tokenizer.
_OF_TOKENS = ("tokens_sha256", "tokens", "windows", "tokens_scored", "prefix", "plan_sha256")


def by_bytes(record: ResultRecord) -> ResultRecord:
    """A record, also of a failed model, as it stands in a table of bits per byte, beside no reference yet.

    What is per token (KL divergence, positions, the paired comparison) is left to the model's own record.
    """
    comparison = {k: v for k, v in record.comparison.items() if k not in _OF_TOKENS} | {"unit": "byte"}
    cleared: dict[str, Any] = {"by_position": (), "against_reference": None, "is_reference": False}
    return record.model_copy(update={"comparison": comparison, **cleared})


def measured(record: ResultRecord, scores: ByteScores) -> ResultRecord:
    """The same with the bits per byte of its scores."""
    metrics = {**record.metrics, **scores.estimates()}
    return record.model_copy(update={"metrics": metrics, "bytes_scored": scores.bytes_scored})


def beside(
    record: ResultRecord, scores: ByteScores, base: ResultRecord, theirs: ByteScores, quantized: bool
) -> ResultRecord:
    """The record compared with the reference of its run.

    Args:
        record: as `by_bytes` made it.
        scores: its own.
        base: the reference's record.
        theirs: the reference's scores.
        quantized: whether the reference is itself quantized.
    """
    found = ln_ratio(scores, theirs)
    if found is None:
        return record
    against = AgainstReference(
        label=base.label, key=base.key, quantized=quantized, metrics={BYTE_LN_RATIO: found}
    )
    return record.model_copy(update={"against_reference": against})
