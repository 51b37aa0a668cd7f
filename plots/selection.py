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
from evalq.results.reference import UNQUANTIZED_BPW
from evalq.show.plain import plain

Axis = Literal["bpw", "vram"]
FARTHEST = 10_000.0  # times the best perplexity: a broken model must not press the others into one line
LARGEST_PPL = 1e12
LARGEST_X = 1e6
LONGEST_BAR = 3.0  # times the perplexity, as far as the axis follows an error bar
NAME_CHARACTERS = 32


@dataclass(frozen=True)
class ChartOptions:
    """What the user may choose.

    Args:
        title: None for a plain description of the axes, "" for no title.
        x: "bpw" (bits per weight of the layers) or "vram" (layers + head, GiB).
        max_x: models beyond it are left out and named under the axes; in units of x.
        max_y: the same for perplexity. None leaves out what is FARTHEST times worse than the best.
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
        has_line: unquantized, or the run's reference: a horizontal line marks its perplexity.
    """

    group: str
    name: str
    x: float
    y: float
    y_stderr: float | None
    color: str | None
    has_line: bool

    @property
    def bar(self) -> tuple[float, float]:
        """Ends of the error bar; the lower one stays above 0 for a logarithmic axis."""
        error = self.y_stderr or 0.0
        return max(self.y - error, 0.5 * self.y), min(self.y + error, FARTHEST * self.y)

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
        levels: models with a line that are outside the axes, of which only the line is drawn.
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
    def lines(self) -> list[Point]:
        """Everything with a horizontal line."""
        return [point for point in self.points if point.has_line] + self.levels


@dataclass(frozen=True)
class Selection:
    """Records sorted into what is drawn and what is only named.

    Args:
        points: in the order of the records.
        groups: group -> its own colour or None; those without a point too, so that a model that fails
            does not change the colours of the others.
        failed: "label (category)" of every model without a point.
        beyond: "label (x, y)" of every model outside max_x or max_y.
        levels: models with a line outside max_x only, whose perplexity is still worth it.
        per: "token" or "word".
        stderr_is_lower_bound: of any point.
        bars_against: the model that error bars are the difference to, None when they are each point's own.
        quantized_reference: the label of the run's reference where that is a quantized model, else None.
    """

    points: list[Point]
    groups: dict[str, str | None]
    failed: list[str]
    beyond: list[str]
    levels: list[Point]
    per: str
    stderr_is_lower_bound: bool
    bars_against: str | None
    quantized_reference: str | None


def number(value: float) -> str:
    """A perplexity, or bits or GiB, in the fewest characters that still tell models apart."""
    if value < 1000:
        return f"{value:.2f}"
    if value < 1e7:
        return f"{value:,.0f}" if value >= 10_000 else f"{value:.0f}"
    return f"{value:.1e}"


def printable(text: str, longest: int) -> str:
    r"""One line, cut with an ellipsis; control characters as the table writes them, such as \x1b."""
    # What no font and no SVG file can hold, such as U+FFFF, is not printable either.
    line = " ".join("".join(c if c.isprintable() else " " for c in plain(text[: 10 * longest])).split())
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
    quantized = _quantized_reference(records)
    found = Selection([], {}, [], [], [], records[0].unit, False, against, quantized)
    points = []
    for record in records:
        group = printable(record.group, NAME_CHARACTERS) or "?"
        found.groups[group] = found.groups.get(group) or usable(record.color)
        reason = _missing(record, options)
        if reason:
            found.failed.append(f"{printable(record.label, 2 * NAME_CHARACTERS)} ({reason})")
        else:
            points.append((record, _point(record, group, options, found)))
    lower_bound = _sort(points, _limits(points, options), options, found)
    if not found.points:
        left_out = ", ".join((found.failed + found.beyond)[:5])
        remedy = "see why each model failed in the table"
        if found.beyond:
            largest = f"perplexities to {LARGEST_PPL:.0e} and {options.x} to {LARGEST_X:.0e} can be drawn"
            remedy = largest if options.max_x is options.max_y is None else "raise max_x or max_y"
        raise SpecError(f"nothing to draw: {left_out}", remedy)
    return replace(found, stderr_is_lower_bound=lower_bound)


def _quantized_reference(records: Sequence[ResultRecord]) -> str | None:
    """The label of the run's reference where that is no unquantized model, None otherwise."""
    against = next((r.against_reference for r in records if r.against_reference), None)
    if against is None:
        return None
    if against.quantized is not None:
        return against.label if against.quantized else None
    # Results of version 1 do not say.
    reference = next((r for r in records if r.label == against.label), None)
    return None if reference is None or _is_unquantized(reference) else reference.label


def _limits(points: Sequence[tuple[ResultRecord, Point]], options: ChartOptions) -> tuple[float, float]:
    """The largest x and y that are drawn."""
    best = min((point.y for _, point in points), default=1.0)
    max_x = math.inf if options.max_x is None else options.max_x
    max_y = FARTHEST * best if options.max_y is None else options.max_y
    return min(max_x, LARGEST_X), min(max_y, LARGEST_PPL)


def _sort(
    points: Sequence[tuple[ResultRecord, Point]],
    limits: tuple[float, float],
    options: ChartOptions,
    found: Selection,
) -> bool:
    """Put every point where it belongs; returns whether an error bar that is drawn is a lower bound."""
    (max_x, max_y), lower_bound = limits, False
    for record, point in points:
        if point.x <= max_x and point.y <= max_y:
            found.points.append(point)
            lower_bound |= record.ppl_stderr_is_lower_bound and point.y_stderr is not None
            continue
        found.beyond.append(_describe(record, point, options))
        if point.has_line and point.y <= max_y:
            found.levels.append(point)
    return lower_bound


def _is_unquantized(record: ResultRecord) -> bool:
    return (record.layer_bpw or 0.0) >= UNQUANTIZED_BPW


def _point(record: ResultRecord, group: str, options: ChartOptions, found: Selection) -> Point:
    x, y = _x(record, options), record.headline_ppl
    assert x is not None and y is not None
    label = printable(record.label, 10 * NAME_CHARACTERS)
    rest = label[len(group) :].strip() if label.startswith(group) else label
    error = record.headline_stderr if found.bars_against is None else _paired_stderr(record)
    return Point(
        group=group,
        name=printable(rest or label or "?", NAME_CHARACTERS),
        x=x,
        y=y,
        y_stderr=error if error is not None and math.isfinite(error) else None,
        color=usable(record.color),
        has_line=_is_unquantized(record) or record.label == found.quantized_reference,
    )


def _x(record: ResultRecord, options: ChartOptions) -> float | None:
    return record.layer_bpw if options.x == "bpw" else record.vram_gb


def _paired_stderr(record: ResultRecord) -> float | None:
    """The standard error of the difference to the reference's perplexity; None for the reference itself.

    Two models find the same tokens hard, so this is what tells them apart; the error of each
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
    # No perplexity is below 1.
    if y is None or not math.isfinite(y) or y < 1:
        return "no perplexity per word" if record.unit == "word" else "no perplexity"
    if x is None or not math.isfinite(x) or x < 0:
        return "bits per weight unknown" if options.x == "bpw" else "size unknown"
    return None


def _describe(record: ResultRecord, point: Point, options: ChartOptions) -> str:
    unit = "bpw" if options.x == "bpw" else "GiB"
    return f"{printable(record.label, 2 * NAME_CHARACTERS)} ({number(point.x)} {unit}, {point.value})"
