"""What stands on the x axis: bits per weight, GiB, bits of the KV cache, or how fast a model generates.

Fewer bits are better and stand on the left. Speed grows to the right, so there the better models are those
on the Pareto frontier: no other model is both faster and at least as good.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from evalq.plots.quantity import Bar
from evalq.results.record import ResultRecord
from evalq.results.speed import Figure, Repeated

Axis = Literal["bpw", "vram", "kv", "speed", "speed-batch"]


@dataclass(frozen=True)
class Across:
    """One kind of x axis.

    Args:
        title: how a chart's title ends.
        label: what stands under the axis.
        unit: after a number.
        value: of a record; None where it has none.
        missing: why it has none.
        bar: ends of a record's spread; None without.
        log_above: the axis is logarithmic where the largest is more than so many times the smallest.
        more_is_better: a Pareto frontier is drawn.
    """

    title: str
    label: Callable[[Sequence[ResultRecord]], str]
    unit: str
    value: Callable[[ResultRecord], float | None]
    missing: str
    bar: Callable[[ResultRecord], Bar | None] = lambda record: None
    log_above: float = math.inf
    more_is_better: bool = False


class _Placed(Protocol):
    @property
    def x(self) -> float: ...

    @property
    def y(self) -> float: ...


Placed = TypeVar("Placed", bound=_Placed)


def frontier(points: Sequence[Placed]) -> list[Placed]:
    """The points that no other one beats in one direction and equals in the other, the fastest first.

    More of x and less of y is better.
    """
    found: list[Placed] = []
    for point in sorted(points, key=lambda p: (-p.x, p.y)):
        if not found or point.y < found[-1].y or (point.x, point.y) == (found[-1].x, found[-1].y):
            found.append(point)
    return found


def _measured(record: ResultRecord, figure: Figure) -> Repeated | None:
    return None if record.speed is None else record.speed.get(figure)


def _speed(figure: Figure, how: Callable[[int], str], title: str) -> Across:
    def value(record: ResultRecord) -> float | None:
        found = _measured(record, figure)
        return None if found is None or not found.median > 0 else found.median

    def bar(record: ResultRecord) -> Bar | None:
        found = _measured(record, figure)
        return None if found is None or found.repeats < 2 or found.low <= 0 else (found.low, found.high)

    def label(records: Sequence[ResultRecord]) -> str:
        sizes = next(record.speed.settings for record in records if record.speed is not None)
        lengths = f"{sizes.new_tokens} after {sizes.prompt_tokens}"
        return f"new tokens per second, {how(sizes.batch)} ({lengths})"

    return Across(title, label, "tok/s", value, "speed not measured", bar, 8.0, True)


ACROSS: dict[Axis, Across] = {
    "bpw": Across(
        "bits per weight",
        lambda records: "bits per weight (layers)",
        "bpw",
        lambda record: record.layer_bpw,
        "bits per weight unknown",
    ),
    "vram": Across(
        "VRAM",
        lambda records: "VRAM of layers + head (GiB)",
        "GiB",
        lambda record: record.vram_gb,
        "size unknown",
    ),
    "kv": Across(
        "bits of the KV cache",
        lambda records: "bits per element of the KV cache",
        "KV bits",
        lambda record: record.kv_bits,
        "bits of the KV cache unknown",
    ),
    "speed": _speed("generation", lambda batch: "one prompt at a time", "speed of generating"),
    "speed-batch": _speed(
        "generation_batch",
        lambda batch: f"{batch} prompts at once",
        "speed of generating a batch",
    ),
}
