"""What stands above and below the axes: title, what is compared, groups; notes on what is missing."""

from collections.abc import Sequence
from typing import Any

from evalq.plots.page import LEADING, MARGIN_PT, Page
from evalq.plots.selection import Selection, Series, printable
from evalq.plots.style import NOTE_PT, SUBTITLE_PT, TITLE_PT
from evalq.results.floor import engine_of
from evalq.results.record import ResultRecord

DATASETS = {"wiki2": "WikiText-2 test", "sample": "evalq sample text", "text": "text file"}


def write_header(
    page: Page,
    records: Sequence[ResultRecord],
    title: str,
    chosen: Selection,
    series: Sequence[Series],
    facts: Sequence[str] | None = None,
) -> float:
    """Write title, subtitle and legend from the top; returns where the axes may begin, points.

    Args:
        page: to write on.
        records: that are drawn.
        title: "" for none.
        chosen: what is drawn of them.
        series: those in the legend.
        facts: what the records have in common; None reads it from them.
    """
    room = page.width - 2 * MARGIN_PT
    y = page.height - MARGIN_PT + 3
    heading = printable(title, 300)
    if heading:
        fits = page.measure(heading, TITLE_PT, "bold")[0] <= room
        size = TITLE_PT if fits else 0.8 * TITLE_PT
        y = page.paragraph(y, [page.shorten(heading, room, size, "bold")], size, page.look.ink, weight="bold")
    facts = list(compared(records) if facts is None else facts)
    if chosen.quantity.divergence and chosen.against is not None:
        facts.append(_reference(records, chosen.against))
    if len(series) == 1 and any(point.name != point.group for point in series[0].points):
        facts.insert(0, series[0].name)
    y = page.paragraph(y, page.wrap(facts, " · ", SUBTITLE_PT, 3), SUBTITLE_PT, page.look.muted)
    if len(series) > 1:
        y = page.legend(y - 6, series)
    return y - 6


def write_footer(page: Page, chosen: Selection) -> float:
    """Write the notes at the bottom; returns where the axes' own numbers may end, points."""
    lines = [line for line in (_bars(chosen), _hollow(chosen), _frontier(chosen)) if line]
    if chosen.quantized_reference is not None:
        lines.append(
            f"reference: {printable(chosen.quantized_reference, 60)}, which is not an unquantized model"
        )
    for lead, pieces, most in (
        ("floor unknown: ", chosen.floors_unknown, 1),
        ("floors far below the axes: ", chosen.floors_below, 2),
        ("beyond the axes: ", chosen.beyond, 2),
        ("not drawn: ", chosen.failed, 3),
    ):
        if pieces:
            lines += page.wrap(pieces, ", ", NOTE_PT, most, lead=lead)
    height = len(lines) * NOTE_PT * LEADING
    page.paragraph(MARGIN_PT - 4 + height, lines, NOTE_PT, page.look.muted)
    return MARGIN_PT + height


def _bars(chosen: Selection) -> str:
    """What the error bars are, "" without any."""
    if not any(point.bar for point in chosen.points):
        return ""
    bound = ", a lower bound because windows overlap" if chosen.stderr_is_lower_bound else ""
    if chosen.quantity.divergence:
        return f"bars: 95% intervals{bound}"
    what = f" of the difference to {printable(chosen.against, 60)}" if chosen.against else ""
    return f"bars: ±1 standard error{what}{bound}"


def _hollow(chosen: Selection) -> str:
    """What hollow markers mean, "" without any."""
    if not any(point.hollow for point in chosen.points):
        return ""
    return "hollow: at or below the engine's floor, the KL divergence of the unquantized model in it"


def _frontier(chosen: Selection) -> str:
    """What the rings mean, "" without any."""
    if not chosen.frontier:
        return ""
    spread = "; bars along x: the slowest and the fastest repetition"
    ringed = "ringed: the Pareto frontier, no other model is both faster and better"
    return ringed + (spread if any(point.x_bar for point in chosen.points) else "")


def _reference(records: Sequence[ResultRecord], label: str) -> str:
    engine = next((engine_of(record) for record in records if record.label == label), None)
    where = "" if engine is None else f" in {printable(engine, 40)}"
    return f"reference {printable(label, 60)}{where}"


def compared(records: Sequence[ResultRecord]) -> list[str]:
    """What every record has in common: text, protocol, windows, number of tokens."""
    scored = next(record for record in records if record.status == "ok")
    known: dict[str, Any] = {**scored.identity, **scored.comparison}
    dataset = str(known.get("dataset", ""))
    length, stride = known.get("eval_len"), known.get("eval_stride")
    tokens = known.get("tokens_scored") or scored.tokens_scored
    facts = [DATASETS.get(dataset, printable(dataset, 60)), f"{scored.protocol} protocol"]
    if length:
        chat = scored.protocol == "chat"
        own = " of each model's own tokenizer" if scored.unit == "byte" else ""
        windows = f"conversations of up to {length} tokens" if chat else f"windows of {length} tokens{own}"
        facts.append(f"{windows}, stride {stride}" if stride and stride != length else windows)
    if tokens and scored.unit != "byte":
        facts.append(f"{tokens:,} tokens scored")
    return [fact for fact in facts if fact]
