"""The result of scoring one model on one text: a versioned, self-describing record.

A record says what it is. `identity` holds everything the perplexity depends on (text, tokens, protocol,
model files, engine and version, numeric options); `execution` holds how it was carried out (device, batch,
host), which is recorded but changes nothing by design. `comparison` is the part of the identity that two
records must share before their perplexities may stand in one table or chart.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evalq.errors import NotComparable

RECORD_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(_Frozen):
    """Why a model has no perplexity."""

    category: str
    message: str
    remedy: str


class AgainstReference(_Frozen):
    """A model beside the reference of its run, token by token, which is far sharper than two error bars."""

    label: str = Field(description="the reference's")
    ppl_ratio: float = Field(description="PPL / the reference's PPL")
    ln_ratio: float = Field(description="mean difference of NLL per token, nats")
    ln_ratio_stderr: float | None = Field(description="its window-clustered standard error")
    significant: bool = Field(description="more than two standard errors from zero")


class ResultRecord(_Frozen):
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

    ppl: float | None = Field(default=None, description="exp(mean NLL) per token")
    ppl_stderr: float | None = Field(default=None, description="window-clustered standard error of ppl")
    ppl_stderr_is_lower_bound: bool = Field(default=False, description="windows overlap")
    nll_nats: float | None = Field(default=None, description="mean negative log-likelihood per token")
    bits_per_byte: float | None = None
    word_ppl: float | None = Field(default=None, description="exp(NLL / words), protocols with words only")
    against_reference: AgainstReference | None = None
    top1: float | None = Field(default=None, description="share of targets that were the model's first guess")
    tokens_scored: int | None = None
    tokens_nonfinite: int | None = None

    tokens_per_second: float | None = Field(default=None, description="scored tokens / seconds of forward()")
    load_seconds: float | None = None
    peak_memory_gib: float | None = Field(
        default=None, description="largest resident (CPU) or allocated (GPU)"
    )

    engine: str
    engine_version: str | None = None
    protocol: str
    notes: list[str] = []
    comparison: dict[str, Any] = Field(description="must be equal for two records to be compared")
    identity: dict[str, Any] = Field(description="everything the perplexity depends on")
    execution: dict[str, Any] = Field(default_factory=dict, description="how the work was carried out")
    key: str | None = Field(default=None, description="where the store keeps it")

    @property
    def unit(self) -> str:
        """What the headline perplexity is per: "token", or "word" where the protocol defines it that way."""
        return str(self.comparison.get("unit", "token"))

    @property
    def headline_ppl(self) -> float | None:
        """The perplexity that the protocol's own tool would print."""
        return self.word_ppl if self.unit == "word" else self.ppl

    @property
    def headline_stderr(self) -> float | None:
        """Standard error of headline_ppl, to first order; None where it is not a finite number above 0."""
        ppl, per_unit = self.headline_ppl, self._tokens_per_unit
        if not ppl or not self.ppl or not self.ppl_stderr or not per_unit:
            return None
        error = ppl * per_unit * self.ppl_stderr / self.ppl
        return error if math.isfinite(error) else None

    @property
    def headline_ratio(self) -> tuple[float, float | None] | None:
        """headline_ppl over the reference's, and its standard error; None without a reference."""
        against, per_unit = self.against_reference, self._tokens_per_unit
        if against is None or per_unit is None:
            return None
        ratio = math.exp(per_unit * against.ln_ratio)
        error = against.ln_ratio_stderr
        return ratio, None if error is None else ratio * per_unit * error

    @property
    def _tokens_per_unit(self) -> float | None:
        """ln(word_ppl) = tokens per word * ln(ppl), so relative errors differ by that factor."""
        if self.unit != "word":
            return 1.0
        if self.word_ppl is None or self.ppl is None or not 1 < self.ppl < math.inf:
            return None
        return math.log(self.word_ppl) / math.log(self.ppl)


def require_comparable(records: list[ResultRecord]) -> None:
    """Raise NotComparable, naming the first difference, unless all scored records share `comparison`."""
    scored = [r for r in records if r.status == "ok"]
    for other in scored[1:]:
        first = scored[0]
        for key in sorted(first.comparison.keys() | other.comparison.keys()):
            mine, theirs = first.comparison.get(key), other.comparison.get(key)
            if mine != theirs:
                raise NotComparable(
                    f'"{first.label}" and "{other.label}" cannot be compared: {key} is {mine} and {theirs}',
                    "score both with one data spec",
                )
