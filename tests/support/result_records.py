"""Result records made by hand, and what a terminal of so many columns shows."""

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from evalq.results.estimate import Estimate
from evalq.results.record import AgainstReference, Failure, ResultRecord

COMPARISON = {
    "dataset": "wiki2",
    "protocol": "exllamav3",
    "eval_len": 2048,
    "eval_stride": 512,
    "windows": 20,
    "tokens_scored": 40940,
    "unit": "token",
}


def record(label: str, ppl: float | None = 12.3456, **more: Any) -> ResultRecord:
    """A scored model."""
    comparison = COMPARISON | more.pop("comparison", {})
    values = {
        "metrics_version": 1,
        "label": label,
        "group": label,
        "status": "ok",
        "layer_bpw": 4.125,
        "head_bpw": 16.0,
        "vram_gb": 5.123,
        "ppl": ppl,
        "ppl_stderr": 0.123,
        "nll_nats": 2.5,
        "tokens_scored": 40940,
        "tokens_per_second": 155055.4,
        "engine": "fake",
        "protocol": comparison["protocol"],
        "comparison": comparison,
        "identity": {},
    }
    return ResultRecord(**values | more)


def failed(label: str, message: str = "CUDA out of memory", remedy: str = "use a larger GPU") -> ResultRecord:
    """A model without a perplexity."""
    error = Failure(category="oom_load", message=message, remedy=remedy)
    return record(label, None, status="failed", error=error, tokens_per_second=None, nll_nats=None)


def against(label: str, ln_ratio: float = 0.01, stderr: float | None = 0.002) -> AgainstReference:
    """A comparison with the reference of this label."""
    ratio = 2.718281828459045**ln_ratio if ln_ratio < 700 else float("inf")
    return AgainstReference(
        label=label, ppl_ratio=ratio, ln_ratio=ln_ratio, ln_ratio_stderr=stderr, significant=True
    )


def terminal(show: Callable[[Console], None], columns: int, is_terminal: bool = True) -> str:
    """What `show` prints on a console of so many columns, without colours."""
    out = io.StringIO()
    show(Console(file=out, width=columns, force_terminal=is_terminal, color_system=None))
    return out.getvalue()


def diverging(
    reference: str, kld: float | None, stderr: float | None = None, **more: Any
) -> AgainstReference:
    """A comparison with its mean KLD, the 95% interval two standard errors wide to both sides."""
    metrics = {"ln_ratio": Estimate(value=0.01, stderr=0.002)}
    if kld is not None:
        ends = {} if stderr is None else {"low": max(kld - 2 * stderr, 0.5 * kld), "high": kld + 2 * stderr}
        metrics["kld"] = Estimate(value=kld, stderr=stderr, **ends)
    metrics |= more.pop("metrics", {})
    return AgainstReference(label=reference, metrics=metrics, **more)
