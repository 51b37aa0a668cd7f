"""The result of scoring one model on one text: a versioned, self-describing record.

A record says what it is. `identity` holds everything the numbers depend on (text, tokens, windows, model
files, engine and version, numeric options); `execution` holds how they were made (device, batch, host), which
is recorded but changes nothing by design. `comparison` is the part of the identity that two records must
share before their perplexities may stand in one table or chart.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from evalq.errors import NotComparable
from evalq.files import read_json
from evalq.results.estimate import Estimate
from evalq.results.experts import ExpertUse
from evalq.results.speed import Speed
from evalq.results.statistics import exp

RECORD_VERSION = 2
# Metrics that stand in the JSON under their own names too, as compare_q and version 1 have them.
FLAT = ("ppl", "nll_nats", "bits_per_byte", "word_ppl", "top1")
PAIR_FLAT = ("ln_ratio",)
# ln(bits per byte / that of the reference), of models with different tokenizers.
BYTE_LN_RATIO = "bits_per_byte_ln_ratio"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Measured(_Frozen):
    """Estimates by name, the oldest of them also as plain keys of the JSON."""

    metrics: dict[str, Estimate] = Field(default={}, description="every metric, by its name")

    @staticmethod
    def gather(given: Any, names: Iterable[str]) -> Any:
        """Plain keys -> `metrics`, which goes first where both are there."""
        if not isinstance(given, Mapping):
            return given
        rest, found = dict(given), {}
        for name in names:
            value, stderr = rest.pop(name, None), rest.pop(f"{name}_stderr", None)
            bound = rest.pop(f"{name}_stderr_is_lower_bound", False)
            if value is not None:
                found[name] = {"value": value, "stderr": stderr, "stderr_is_lower_bound": bool(bound)}
        return {"metrics": found} | rest

    def spread(self, plain: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """`metrics` -> plain keys beside it."""
        for name in names:
            estimate = self.metrics.get(name)
            plain[name] = None if estimate is None else estimate.value
            plain[f"{name}_stderr"] = None if estimate is None else estimate.stderr
        return plain

    def value(self, name: str) -> float | None:
        """A metric's value, None where it is not there."""
        return self.metrics[name].value if name in self.metrics else None

    def stderr(self, name: str) -> float | None:
        """A metric's standard error, None where there is none."""
        return self.metrics[name].stderr if name in self.metrics else None


class AtPosition(_Frozen):
    """What was measured of the tokens that have so many others before them in their window."""

    start: int = Field(description="tokens before the first of them, at least")
    stop: int = Field(description="tokens before each of them, fewer than this")
    tokens: int = Field(description="scored there")
    metrics: dict[str, Estimate] = Field(
        description="by name; empty where too many log-probabilities are not finite"
    )


class Failure(_Frozen):
    """Why a model has no perplexity."""

    category: str
    message: str
    remedy: str


class Floor(_Frozen):
    """The KLD that an engine shows without any quantization: nothing at or below it says anything."""

    engine: str = Field(description="whose it is")
    label: str = Field(description="of the model that it was measured with")
    kind: Literal["unquantized", "noise"] = Field(
        description="the unquantized model in this engine, or the reference with noise on every layer"
    )
    kld: Estimate = Field(description="its mean KLD against the reference")


_MADE_OF_RATIO = ("ppl_ratio", "bits_per_byte_ratio", "significant")


class AgainstReference(_Measured):
    """A model beside the reference of its run, token by token, which is far sharper than two error bars."""

    label: str = Field(description="the reference's")
    key: str | None = Field(default=None, description="where the store keeps the reference")
    quantized: bool | None = Field(default=None, description="whether the reference is a quantized model")
    floor: Floor | None = Field(default=None, description="of the model's engine; null where it is unknown")
    by_position: tuple[AtPosition, ...] = Field(
        default=(), description="ln_ratio, KLD and same-top by position in the window; as the record's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_plain(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            given = {k: v for k, v in given.items() if k not in _MADE_OF_RATIO}
        return cls.gather(given, PAIR_FLAT)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "ln_ratio" not in self.metrics and BYTE_LN_RATIO not in self.metrics:
            raise ValueError("a comparison holds ln_ratio")
        return self

    @model_serializer(mode="wrap")
    def _to_plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = self.spread(handler(self), PAIR_FLAT)
        return plain | {self._ratio_name: self.ratio, "significant": self.significant}

    @property
    def _ratio_name(self) -> str:
        """What the ratio is called in JSON."""
        return "ppl_ratio" if "ln_ratio" in self.metrics else "bits_per_byte_ratio"

    @property
    def log_ratio(self) -> Estimate:
        """Ln of the ratio of the perplexities per token; of bits per byte where tokenizers differ."""
        return self.metrics["ln_ratio" if "ln_ratio" in self.metrics else BYTE_LN_RATIO]

    @property
    def ln_ratio(self) -> float:
        """Its value: positive when the model is worse."""
        return self.log_ratio.value

    @property
    def ln_ratio_stderr(self) -> float | None:
        """Its clustered standard error; None with fewer than two windows."""
        return self.log_ratio.stderr

    @property
    def ratio(self) -> float:
        """PPL / the reference's PPL, per token, or bits per byte / the reference's."""
        return exp(self.ln_ratio)

    @property
    def ppl_ratio(self) -> float | None:
        """PPL / the reference's PPL, per token; None where their tokens differ."""
        return self.ratio if "ln_ratio" in self.metrics else None

    @property
    def significant(self) -> bool:
        """Whether the 95% interval of the difference leaves zero out; False without an error."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of ln_ratio; of records of evalq 0.1 two standard errors to both sides."""
        found, error = self.log_ratio.interval, self.ln_ratio_stderr
        if found is None and error is not None:
            return self.ln_ratio - 2 * error, self.ln_ratio + 2 * error
        return found


class BesideOther(_Frozen):
    """A model beside another one of its run on the same tokens: a cell of a matrix of all pairs."""

    quantity: Literal["ppl", "kld", "same_top"]
    other: str = Field(description="label of the other model")
    difference: Estimate = Field(
        description="this model minus the other: of ln PPL, of the mean KLD (nats), of the share of same-top"
    )
    p: float | None = Field(description="two-sided p-value of this pair alone; null without an error")
    p_holm: float | None = Field(description="corrected for the number of pairs of this quantity")
    differs: bool = Field(description="p_holm is below 0.05")
    only_this: int | None = Field(default=None, description="same_top: tokens that this model alone gets")
    only_other: int | None = Field(default=None, description="same_top: tokens that the other alone gets")


class ModelFacts(_Frozen):
    """What was scored, as a paper names it."""

    path: str = Field(description="directory or file, as found when it was scored")
    hub_name: str | None = Field(default=None, description="owner/name, when it came from the hub")
    commit: str | None = Field(default=None, description="of the hub")
    architecture: str | None = None
    parameters: int | None = Field(default=None, description="all weights")
    parameters_without_embeddings: int | None = Field(
        default=None, description="without input embeddings and head"
    )


class ResultRecord(_Measured):
    """One (data, model) pair.

    The keys of exllamav3's compare_q (label, layer_bpw, head_bpw, vram_gb, ppl) keep their names and units.
    Bits per weight and sizes come from file headers; `vram_gb` is layers plus head in GiB (2**30 bytes).
    """

    record_version: int = RECORD_VERSION
    metrics_version: int
    label: str = Field(description="as in the spec, without the [colour]")
    group: str = Field(description="first word of the label: the series in a chart")
    color: str | None = None
    status: Literal["ok", "failed"]
    error: Failure | None = None

    layer_bpw: float | None = None
    head_bpw: float | None = None
    vram_gb: float | None = Field(default=None, description="layers + head, GiB")
    disk_gib: float | None = Field(default=None, description="every tensor, GiB")
    format: str | None = Field(default=None, description="checkpoint format in one line")
    lora: str | None = Field(default=None, description="name of the adapter on top")
    kv_cache: str | None = Field(
        default=None, description="type of cached keys and values, K/V apart; null for the engine's own"
    )
    kv_bits: float | None = Field(
        default=None, description="bits per element of the KV cache, scales included; mean of keys and values"
    )
    kv_bits_k: float | None = Field(default=None, description="of the keys")
    kv_bits_v: float | None = Field(default=None, description="of the values")
    derived: bool = Field(
        default=False,
        description="made out of another checkpoint (dequantized, merged), with an adapter, or with a "
        "quantized KV cache",
    )
    model: ModelFacts | None = None

    is_reference: bool = Field(default=False, description="the others of its run were compared with it")
    against_reference: AgainstReference | None = None
    beside_others: tuple[BesideOther, ...] = Field(
        default=(), description="every other model of the run, in the output of --significance"
    )
    tokens_scored: int | None = None
    bytes_scored: int | None = Field(default=None, description="of the text; with --per-byte")
    tokens_nonfinite: int | None = None
    moe: dict[str, ExpertUse] = Field(
        default={}, description="of a mixture of experts, by layer: which ones the text reached (hf)"
    )
    by_position: tuple[AtPosition, ...] = Field(
        default=(),
        description="perplexity by position in the window; empty where no window is longer than 1024",
    )

    tokens_per_second: float | None = Field(
        default=None,
        description="scored tokens per second in the engine, warm-up and KL divergence left out",
    )
    speed: Speed | None = Field(default=None, description="of --speed: measured on its own, repeatedly")
    load_seconds: float | None = None
    peak_memory_gib: float | None = Field(
        default=None, description="largest resident (CPU) or allocated (GPU)"
    )

    engine: str
    engine_version: str | None = None
    protocol: str
    source: dict[str, Any] = Field(
        default={},
        description="where the text came from: data set and commit, or files and what was left out",
    )
    scored_at: str | None = Field(default=None, description="when scoring ended, ISO 8601, UTC")
    notes: list[str] = []
    comparison: dict[str, Any] = Field(description="must be equal for two records to be compared")
    identity: dict[str, Any] = Field(description="everything the perplexity depends on")
    execution: dict[str, Any] = Field(default_factory=dict, description="how the work was carried out")
    key: str | None = Field(default=None, description="where the store keeps it")

    @model_validator(mode="before")
    @classmethod
    def _from_plain(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            given = {k: v for k, v in given.items() if k not in ("verdict", "text")}  # of --json, made anew
        return cls.gather(given, FLAT)

    @model_serializer(mode="wrap")
    def _to_plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = self.spread(handler(self), FLAT)
        return plain | {"ppl_stderr_is_lower_bound": self.ppl_stderr_is_lower_bound}

    @property
    def ppl(self) -> float | None:
        """exp(mean NLL) per token."""
        return self.value("ppl")

    @property
    def ppl_stderr(self) -> float | None:
        """Clustered standard error of ppl."""
        return self.stderr("ppl")

    @property
    def ppl_stderr_is_lower_bound(self) -> bool:
        """Whether windows overlap and its error does not take that into account, as in evalq 0.1."""
        return "ppl" in self.metrics and self.metrics["ppl"].stderr_is_lower_bound

    @property
    def unit(self) -> str:
        """What the headline is per: "token", "word" where the protocol defines it so, or "byte"."""
        return str(self.comparison.get("unit", "token"))

    @property
    def quantity(self) -> str:
        """What the headline is, with its unit: "perplexity per token"."""
        return "bits per byte" if self.unit == "byte" else f"perplexity per {self.unit}"

    @property
    def quantity_in_short(self) -> str:
        """The same for a narrow column: "PPL/token"."""
        return "bits/byte" if self.unit == "byte" else f"PPL/{self.unit}"

    @property
    def headline(self) -> Estimate | None:
        """The perplexity that the protocol's own tool would print, or bits per byte."""
        return self.metrics.get(_HEADLINES.get(self.unit, "ppl"))

    @property
    def headline_ppl(self) -> float | None:
        """Its value; None for a failed model, or where the text has no words to count."""
        return None if self.headline is None else self.headline.value

    @property
    def headline_stderr(self) -> float | None:
        """Standard error of headline_ppl, to first order; None where it is not a finite number above 0."""
        if self.headline is None:
            return None
        error, per_unit = self.headline.stderr, self._tokens_per_unit
        if error is None and self.unit == "word" and self.ppl and self.ppl_stderr and per_unit:
            # Records of version 1 kept the error per token only.
            error = self.headline.value * per_unit * self.ppl_stderr / self.ppl
        return error if error and math.isfinite(error) else None

    @property
    def headline_ratio(self) -> tuple[float, float | None] | None:
        """headline_ppl over the reference's, and its standard error; None without a reference.

        The ratio is infinite for a model that is too far off for a float.
        """
        against, per_unit = self.against_reference, self._tokens_per_unit
        if against is None or per_unit is None:
            return None
        ratio = exp(per_unit * against.ln_ratio)
        error = against.ln_ratio_stderr
        if error is None or not math.isfinite(ratio * per_unit * error):
            return ratio, None
        return ratio, ratio * per_unit * error

    @property
    def headline_change(self) -> tuple[float, float] | None:
        """The 95% interval of headline_ppl over the reference's, minus 1: -0.01 is 1% better.

        None without a reference or an error.
        """
        against, per_unit = self.against_reference, self._tokens_per_unit
        found = None if against is None else against.interval
        if found is None or per_unit is None:
            return None
        return exp(per_unit * found[0]) - 1, exp(per_unit * found[1]) - 1

    @property
    def _tokens_per_unit(self) -> float | None:
        """ln(word_ppl) = tokens per word * ln(ppl), so relative errors differ by that factor."""
        if self.unit != "word":
            return 1.0
        word_ppl, ppl = self.value("word_ppl"), self.ppl
        if word_ppl is None or ppl is None or not 1 < ppl < math.inf or not 0 < word_ppl < math.inf:
            return None
        return math.log(word_ppl) / math.log(ppl)


def windows_text(comparison: Mapping[str, Any]) -> str:
    """How many windows of what length a result was scored on, in a few words."""
    count, length = comparison.get("windows"), comparison.get("eval_len")
    if comparison.get("protocol") == "chat":
        return f"{count} conversations of up to {length} tokens"
    return f"{count} windows of {length} tokens"


# What stands for a result, by the unit of its comparison.
_HEADLINES = {"word": "word_ppl", "byte": "bits_per_byte"}


def read_record(folder: Path) -> ResultRecord | None:
    """The record in a result's folder; None when there is none, or it cannot be read."""
    try:
        return ResultRecord.model_validate(read_json(folder / "record.json"))
    except (ValueError, TypeError, RecursionError):
        return None


# Version 1 did not keep it; the counts and lengths beside it then decide alone.
_SINCE_2 = ("plan_sha256",)


def same_comparison(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key that two comparisons do not share; None when their results can be compared."""
    for key in sorted(one.keys() | other.keys()):
        if key in _SINCE_2 and (key not in one or key not in other):
            continue
        if one.get(key) != other.get(key):
            return key
    return None


def require_comparable(records: list[ResultRecord]) -> None:
    """Raise NotComparable, naming the first difference, unless all scored records share `comparison`."""
    scored = [r for r in records if r.status == "ok"]
    for other in scored[1:]:
        first = scored[0]
        key = same_comparison(first.comparison, other.comparison)
        if key is None:
            continue
        mine, theirs = first.comparison.get(key), other.comparison.get(key)
        remedy = "score both with one data spec"
        if key == "tokens_sha256":
            remedy = (
                "two tokenizers cut the text into other tokens, so numbers per token measure other things; "
                "--per-byte compares them by bits per byte"
            )
        raise NotComparable(
            f'"{first.label}" and "{other.label}" cannot be compared: {key} is {mine} and {theirs}', remedy
        )
