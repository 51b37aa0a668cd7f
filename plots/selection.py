"""Which records a chart can show, as plain numbers, and why the others are left out.

The y value is the protocol's own perplexity (per word for `lm-eval`, per token for every other), or the mean
KL divergence from the reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from evalq.errors import SpecError
from evalq.plots.across import ACROSS, Across, Axis, frontier
from evalq.plots.quantity import Bar, Quantity, number, quantity_of
from evalq.plots.style import usable
from evalq.results.floor import engine_of, floors, is_noise
from evalq.results.record import ResultRecord, require_comparable
from evalq.results.reference import UNQUANTIZED_BPW
from evalq.show.plain import plain

YAxis = Literal["ppl", "kld"]
LARGEST_Y = 1e12
LARGEST_X = 1e6
# A floor so many times below the best model is named instead of drawn: the points need the room.
FLOOR_DEPTH = 100.0
NAME_CHARACTERS = 32


@dataclass(frozen=True)
class ChartOptions:
    """What the user may choose.

    Args:
        title: None for a plain description of the axes, "" for no title.
        x: "bpw" (bits per weight of the layers), "vram" (layers + head, GiB), "speed" (new tokens per second
            of one prompt) or "speed-batch" (of a batch).
        y: "ppl" (the protocol's perplexity) or "kld" (mean KL divergence from the reference).
        max_x: models beyond it are left out and named under the axes; in units of x.
        max_y: the same for y. None leaves out perplexities FARTHEST times worse than the best.
        dark: light lines on a dark page.
        y_label: instead of "perplexity per token" (or "per word").
        width: inches.
        height: inches; the page grows where header and notes would leave no room for the axes.

    Raises:
        SpecError: a value that no chart can be drawn with.
    """

    title: str | None = None
    x: Axis = "bpw"
    y: YAxis = "ppl"
    max_x: float | None = None
    max_y: float | None = None
    dark: bool = False
    y_label: str | None = None
    width: float = 8.0
    height: float = 5.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, known in (("x", self.x, get_args(Axis)), ("y", self.y, get_args(YAxis))):
            if value not in known:
                raise SpecError(f'chart: {name} is "{value}"', f"one of {', '.join(known)}")
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
        y: perplexity or KL divergence.
        value: y as the chart writes it.
        bar: ends of its error bar, both above 0; None if unknown.
        color: the record's own as hex, None for the group's.
        has_line: unquantized, or the run's reference: a horizontal line marks its perplexity.
        hollow: at or below its engine's floor, so that its KL divergence says nothing.
        x_bar: the smallest and the largest x that was measured, None without.
    """

    group: str
    name: str
    x: float
    y: float
    value: str
    bar: Bar | None
    color: str | None
    has_line: bool
    hollow: bool = False
    x_bar: Bar | None = None


@dataclass(frozen=True)
class FloorLine:
    """The KL divergence that an engine shows without any quantization.

    Args:
        name: what stands at the line.
        y: nats per token, above 0.
        group: the only series of this engine, whose colour the line takes; None where there are several.
    """

    name: str
    y: float
    group: str | None


@dataclass(frozen=True)
class Series:
    """One group as it is drawn.

    Args:
        name: the group.
        color: hex.
        marker: matplotlib's name of its shape.
        points: sorted by x.
        levels: models with a line that are outside the axes, of which only the line is drawn.
        joins: whether points that follow each other along x belong together: bits do, speeds do not.
    """

    name: str
    color: str
    marker: str
    points: list[Point]
    levels: list[Point]
    joins: bool = True

    @property
    def joined(self) -> bool:
        """Whether a dotted line runs through the points."""
        return self.joins and len(self.points) > 1

    @property
    def lines(self) -> list[Point]:
        """Everything with a horizontal line."""
        return [point for point in self.points if point.has_line] + self.levels


@dataclass(frozen=True)
class Selection:
    """Records sorted into what is drawn and what is only named.

    Args:
        quantity: on the y axis.
        across: on the x axis.
        points: in the order of the records.
        groups: group -> its own colour or None; those without a point too, so that a model that fails
            does not change the colours of the others.
        failed: "label (category)" of every model without a point.
        beyond: "label (x, y)" of every model outside max_x or max_y.
        levels: models with a line outside max_x only, whose perplexity is still worth it.
        floors: of engines, where KL divergence is drawn.
        floors_unknown: engines whose floor is not known.
        floors_below: engine and floor, where that is too far below the points to be drawn.
        per: "token" or "word".
        stderr_is_lower_bound: of any point.
        against: the run's reference, None without one; bars of perplexities are of the difference to it.
        quantized_reference: the label of the run's reference where that is a quantized model, else None.
        frontier: the points on the Pareto frontier, the fastest first; empty where x is not speed.
    """

    quantity: Quantity
    across: Across
    points: list[Point] = field(default_factory=list)
    groups: dict[str, str | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    levels: list[Point] = field(default_factory=list)
    floors: list[FloorLine] = field(default_factory=list)
    floors_unknown: list[str] = field(default_factory=list)
    floors_below: list[str] = field(default_factory=list)
    per: str = "token"
    stderr_is_lower_bound: bool = False
    against: str | None = None
    quantized_reference: str | None = None
    frontier: tuple[Point, ...] = ()


def printable(text: str, longest: int) -> str:
    r"""One line, cut with an ellipsis; control characters as the table writes them, such as \x1b."""
    # What no font and no SVG file can hold, such as U+FFFF, is not printable either.
    line = " ".join("".join(c if c.isprintable() else " " for c in plain(text[: 10 * longest])).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def select(
    records: Sequence[ResultRecord], options: ChartOptions, quantity: Quantity | None = None
) -> Selection:
    """Sort records into drawn, failed and beyond the axes.

    Args:
        records: of one text.
        options: axis, limits.
        quantity: on the y axis; None for the one that the options name.

    Raises:
        NotComparable: the records measure different things.
        SpecError: nothing is left to draw.
    """
    if not records:
        raise SpecError("nothing to draw: no results were given", "score at least one model first")
    require_comparable(list(records))
    against = next((r.against_reference.label for r in records if r.against_reference), None)
    found = Selection(
        quantity or quantity_of(options.y, records),
        ACROSS[options.x],
        per=records[0].unit,
        against=against,
        quantized_reference=_quantized_reference(records),
    )
    only_lines = _labels_of_lines(records, found)
    points = []
    for record in records:
        group = _group(record)
        found.groups[group] = found.groups.get(group) or usable(record.color)
        if record.label in only_lines:
            continue
        reason = _missing(record, found)
        if reason:
            found.failed.append(f"{printable(record.label, 2 * NAME_CHARACTERS)} ({reason})")
        else:
            points.append((record, _point(record, records, found)))
    lower_bound = _sort(points, _limits(points, found.quantity, options), options, found)
    if not found.points:
        left_out = ", ".join((found.failed + found.beyond)[:5]) or "there is nothing beside the reference"
        remedy = "see why each model failed in the table"
        if found.beyond:
            largest = (
                f"{found.quantity.values} to {LARGEST_Y:.0e} and {options.x} to {LARGEST_X:.0e} can be drawn"
            )
            remedy = largest if options.max_x is options.max_y is None else "raise max_x or max_y"
        raise SpecError(f"nothing to draw: {left_out}", remedy)
    if found.quantity.divergence:
        _add_floors(records, found)
    best = tuple(frontier(found.points)) if found.across.more_is_better else ()
    return replace(found, stderr_is_lower_bound=lower_bound, frontier=best)


def _labels_of_lines(records: Sequence[ResultRecord], found: Selection) -> set[str]:
    """Models without a point on the axis of KL divergence: the reference, which has none, and floors."""
    if not found.quantity.divergence:
        return set()
    labels = {one.floor.label for one in floors(records) if one.floor is not None}
    labels |= {r.label for r in records if is_noise(r) and r.status == "ok"}
    return labels | {r.label for r in records if r.status == "ok" and r.label == found.against}


def _add_floors(records: Sequence[ResultRecord], found: Selection) -> None:
    """Lines for the floors that can be drawn, words for the others."""
    lowest = min(point.y for point in found.points)
    for one in floors(records):
        engine = printable(one.engine, NAME_CHARACTERS)
        y = None if one.floor is None else found.quantity.floor(one.floor)
        if one.floor is None or y is None:
            found.floors_unknown.append(engine)
            continue
        name = f"{engine} ({printable(one.floor.label, NAME_CHARACTERS)}) {found.quantity.number(y)}"
        if not lowest / FLOOR_DEPTH <= y <= LARGEST_Y:
            found.floors_below.append(name)
            continue
        groups = {_group(r) for r in records if engine_of(r) == one.engine and r.label != one.floor.label}
        drawn = groups & {point.group for point in found.points}
        found.floors.append(FloorLine(f"floor: {name}", y, drawn.pop() if len(drawn) == 1 else None))


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


def _limits(
    points: Sequence[tuple[ResultRecord, Point]], quantity: Quantity, options: ChartOptions
) -> tuple[float, float]:
    """The largest x and y that are drawn."""
    best = min((point.y for _, point in points), default=1.0)
    max_x = math.inf if options.max_x is None else options.max_x
    max_y = quantity.farthest * best if options.max_y is None else options.max_y
    return min(max_x, LARGEST_X), min(max_y, LARGEST_Y)


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
            lower_bound |= record.ppl_stderr_is_lower_bound and point.bar is not None
            continue
        found.beyond.append(_describe(record, point, found.across))
        if point.has_line and point.y <= max_y:
            found.levels.append(point)
    return lower_bound


def _is_unquantized(record: ResultRecord) -> bool:
    """Neither its weights nor its KV cache are quantized."""
    cache = math.inf if record.kv_cache is None or record.kv_bits is None else record.kv_bits
    return min(record.layer_bpw or 0.0, cache) >= UNQUANTIZED_BPW


def _group(record: ResultRecord) -> str:
    return printable(record.group, NAME_CHARACTERS) or "?"


def _point(record: ResultRecord, records: Sequence[ResultRecord], found: Selection) -> Point:
    group, quantity = _group(record), found.quantity
    x, y = found.across.value(record), quantity.value(record)
    assert x is not None and y is not None
    label = printable(record.label, 10 * NAME_CHARACTERS)
    rest = label[len(group) :].strip() if label.startswith(group) else label
    divergence = quantity.divergence
    marked = _is_unquantized(record) or record.label == found.quantized_reference
    own_bar = found.against is None or record.against_reference is not None or divergence
    return Point(
        group=group,
        name=printable(rest or label or "?", NAME_CHARACTERS),
        x=x,
        y=y,
        value=quantity.number(y),
        bar=quantity.bar(record) if own_bar else None,
        color=usable(record.color),
        has_line=marked and not divergence,
        hollow=divergence and quantity.at_floor(record, records),
        x_bar=found.across.bar(record),
    )


def _missing(record: ResultRecord, found: Selection) -> str | None:
    """Why the record has no point, None when it has one."""
    if record.status == "failed":
        return printable(record.error.category, NAME_CHARACTERS) if record.error else "failed"
    x, reason = found.across.value(record), found.quantity.missing(record)
    if reason is None and (x is None or not math.isfinite(x) or x < 0):
        reason = found.across.missing
    return reason


def _describe(record: ResultRecord, point: Point, across: Across) -> str:
    x = f"{number(point.x)} {across.unit}"
    return f"{printable(record.label, 2 * NAME_CHARACTERS)} ({x}, {point.value})"
