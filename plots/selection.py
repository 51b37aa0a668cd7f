"""Which records a chart can show, as plain numbers, and why the others are left out.

The y value is the protocol's own perplexity: per word for `lm-eval`, per token for every other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from evalq.errors import SpecError
from evalq.plots.style import usable
from evalq.results.record import ResultRecord, require_comparable

Axis = Literal["bpw", "vram"]
UNQUANTIZED_BPW = 16.0
NAME_CHARACTERS = 32


@dataclass(frozen=True)
class ChartOptions:
    """What the user may choose.

    Args:
        title: None for a plain description of the axes, "" for no title.
        x: "bpw" (bits per weight of the layers) or "vram" (layers + head, GiB).
        max_x: models beyond it are left out and named under the axes; in units of x.
        max_y: the same for perplexity.
        dark: light lines on a dark page.
        y_label: instead of "perplexity per token" (or "per word").
        width: inches.
        height: inches; the page grows where header and notes would leave no room for the axes.

    Raises:
        SpecError: a value that no chart can be drawn with.
    """

    title: str | None = None
    x: Axis = "bpw"
    max_x: float | None = None
    max_y: float | None = None
    dark: bool = False
    y_label: str | None = None
    width: float = 8.0
    height: float = 5.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.x not in get_args(Axis):
            raise SpecError(f'chart: x is "{self.x}"', f"one of {', '.join(get_args(Axis))}")
        for name, limit in (("max_x", self.max_x), ("max_y", self.max_y)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise SpecError(f"chart: {name} is {limit}", "a number above 0")
        for name, inches in (("width", self.width), ("height", self.height)):
            if not 3 <= inches <= 40:
                raise SpecError(f"chart: {name} is {inches} inches", "from 3 to 40")


@dataclass(frozen=True)
class Point:
    """One model in the chart.

    Args:
        group: the series.
        name: the label without its group, shown beside the point.
        x: bits per weight or GiB.
        y: perplexity.
        y_stderr: standard error of its difference to the run's reference where there is one, else of
            itself; None if unknown.
        color: the record's own as hex, None for the group's.
        is_reference: unquantized: a horizontal line marks its perplexity.
    """

    group: str
    name: str
    x: float
    y: float
    y_stderr: float | None
    color: str | None
    is_reference: bool

    @property
    def bar(self) -> tuple[float, float]:
        """Ends of the error bar; the lower one stays above 0 for a logarithmic axis."""
        error = self.y_stderr or 0.0
        return max(self.y - error, 0.5 * self.y), self.y + error

    @property
    def value(self) -> str:
        """Perplexity as the chart writes it."""
        return number(self.y)


@dataclass(frozen=True)
class Series:
    """One group as it is drawn.

    Args:
        name: the group.
        color: hex.
        marker: matplotlib's name of its shape.
        points: sorted by x.
        levels: unquantized models outside the axes, of which only the line is drawn.
    """

    name: str
    color: str
    marker: str
    points: list[Point]
    levels: list[Point]

    @property
    def joined(self) -> bool:
        """Whether a dotted line runs through the points."""
        return len(self.points) > 1

    @property
    def references(self) -> list[Point]:
        """Everything with a horizontal line."""
        return [point for point in self.points if point.is_reference] + self.levels


@dataclass(frozen=True)
class Selection:
    """Records sorted into what is drawn and what is only named.

    Args:
        points: in the order of the records.
        groups: group -> its own colour or None; those without a point too, so that a model that fails
            does not change the colours of the others.
        failed: "label (category)" of every model without a point.
        beyond: "label (x, y)" of every model outside max_x or max_y.
        levels: unquantized models outside max_x only, whose perplexity is still worth a line.
        per: "token" or "word".
        stderr_is_lower_bound: of any point.
        bars_against: the model that error bars are the difference to, None when they are each point's own.
    """

    points: list[Point]
    groups: dict[str, str | None]
    failed: list[str]
    beyond: list[str]
    levels: list[Point]
    per: str
    stderr_is_lower_bound: bool
    bars_against: str | None


def number(value: float) -> str:
    """A perplexity in the fewest characters that still tell models apart."""
    if value < 1000:
        return f"{value:.2f}"
    if value < 1e7:
        return f"{value:,.0f}" if value >= 10_000 else f"{value:.0f}"
    return f"{value:.1e}"


def printable(text: str, longest: int) -> str:
    """One line without control characters, cut with an ellipsis."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def select(records: Sequence[ResultRecord], options: ChartOptions) -> Selection:
    """Sort records into drawn, failed and beyond the axes.

    Raises:
        NotComparable: the perplexities measure different things.
        SpecError: nothing is left to draw.
    """
    if not records:
        raise SpecError("nothing to draw: no results were given", "score at least one model first")
    require_comparable(list(records))
    against = next((r.against_reference.label for r in records if r.against_reference), None)
    found = Selection([], {}, [], [], [], "token", False, against)
    lower_bound = False
    for record in records:
        group = printable(record.group, NAME_CHARACTERS) or "?"
        found.groups[group] = found.groups.get(group) or usable(record.color)
        reason = _missing(record, options)
        if reason:
            found.failed.append(f"{printable(record.label, 2 * NAME_CHARACTERS)} ({reason})")
            continue
        point = _point(record, group, options, paired=against is not None)
        if _beyond(point, options):
            found.beyond.append(_describe(record, point, options))
            if point.is_reference and (options.max_y is None or point.y <= options.max_y):
                found.levels.append(point)
            continue
        found.points.append(point)
        lower_bound |= record.ppl_stderr_is_lower_bound and point.y_stderr is not None
    if not found.points:
        left_out = ", ".join((found.failed + found.beyond)[:5])
        remedy = "raise max_x or max_y" if found.beyond else "see why each model failed in the table"
        raise SpecError(f"nothing to draw: {left_out}", remedy)
    return replace(found, per=records[0].unit, stderr_is_lower_bound=lower_bound)


def _point(record: ResultRecord, group: str, options: ChartOptions, paired: bool) -> Point:
    x, y = _x(record, options), record.headline_ppl
    assert x is not None and y is not None
    label = printable(record.label, 10 * NAME_CHARACTERS)
    rest = label[len(group) :].strip() if label.startswith(group) else label
    return Point(
        group=group,
        name=printable(rest or label or "?", NAME_CHARACTERS),
        x=x,
        y=y,
        y_stderr=_paired_stderr(record) if paired else record.headline_stderr,
        color=usable(record.color),
        is_reference=(record.layer_bpw or 0.0) >= UNQUANTIZED_BPW,
    )


def _x(record: ResultRecord, options: ChartOptions) -> float | None:
    return record.layer_bpw if options.x == "bpw" else record.vram_gb


def _paired_stderr(record: ResultRecord) -> float | None:
    """The standard error of the difference to the reference's perplexity; None for the reference itself.

    Two models stumble over the same tokens, so this is what tells them apart; the error of each
    perplexity alone is many times larger.
    """
    if record.headline_ratio is None or record.headline_ppl is None:
        return None
    ratio, stderr = record.headline_ratio
    return record.headline_ppl / ratio * stderr if stderr else None


def _missing(record: ResultRecord, options: ChartOptions) -> str | None:
    """Why the record has no point, None when it has one."""
    if record.status == "failed":
        return printable(record.error.category, NAME_CHARACTERS) if record.error else "failed"
    x, y = _x(record, options), record.headline_ppl
    # No perplexity is below 1, and a logarithmic axis needs both above 0.
    if y is None or not math.isfinite(y) or y <= 0:
        return "no perplexity per word" if record.unit == "word" else "no perplexity"
    if x is None or not math.isfinite(x) or x < 0:
        return "bits per weight unknown" if options.x == "bpw" else "size unknown"
    return None


def _beyond(point: Point, options: ChartOptions) -> bool:
    too_far = options.max_x is not None and point.x > options.max_x
    return too_far or (options.max_y is not None and point.y > options.max_y)


def _describe(record: ResultRecord, point: Point, options: ChartOptions) -> str:
    unit = "bpw" if options.x == "bpw" else "GiB"
    return f"{printable(record.label, 2 * NAME_CHARACTERS)} ({point.x:.2f} {unit}, {point.value})"
