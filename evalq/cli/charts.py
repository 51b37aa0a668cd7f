"""The charts that `evalq compare` is asked for: which, of what, and into which files."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evalq.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from evalq.plots.across import Axis
    from evalq.plots.position import PositionChart
    from evalq.plots.scatter import ChartOptions
    from evalq.results.record import ResultRecord

KINDS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class _Chart:
    """One chart of a run.

    Args:
        text: name of the text that it shows, "" where there is one text, and for the means.
        file: where it goes.
        draw: makes it; raises SpecError where nothing is to be drawn.
        why_not: why it is not drawn, "" where it is.
    """

    text: str
    file: Path
    draw: "Callable[[], Figure]"
    why_not: str


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for.

    Args:
        file: of the only chart; with several texts their names go behind its own.
        options: of charts against bits per weight or GiB.
        position: of charts by position in the window; None for the others.
        mean: one chart of the means over texts.
    """

    file: Path
    options: "ChartOptions"
    position: "PositionChart | None"
    mean: bool


def drawing(arguments: argparse.Namespace) -> "Callable[[Sequence[ResultRecord], Console], None] | None":
    """Draws the charts that were asked for, None when none was. Raises SpecError when it could not."""
    flags = ("plot", "chart_kld", "plot_file", "show", "by_position", "chart_mean", "chart_speed", "kv_bits")
    if not any(getattr(arguments, flag) for flag in flags):
        return None
    if arguments.chart_mean and len(arguments.dataspec) < 2:
        raise SpecError("--chart-mean draws means over texts, and -d names one", "name several texts with -d")
    if arguments.chart_mean and arguments.by_position:
        raise SpecError("--chart-mean and --by-position are two charts", "leave one of them out")
    if arguments.chart_speed and (arguments.by_position or arguments.vram or arguments.kv_bits):
        other = "--by-position" if arguments.by_position else "-v" if arguments.vram else "--kv-bits"
        raise SpecError(f"--chart-speed and {other} are two charts", "leave one of them out")
    try:
        from evalq.plots import position, scatter
    except ImportError as error:
        raise SpecError(f"cannot draw: {error}", 'pip install "evalq[plot]", or leave -p out') from None
    file = arguments.plot_file or _default_file(arguments)
    if file.suffix.lower() not in KINDS:
        raise SpecError(f"-o {file}: unknown kind of picture", "name a .png, .svg or .pdf file")
    options = scatter.ChartOptions(
        title=arguments.title,
        x=_x_axis(arguments),
        y="kld" if arguments.chart_kld else "ppl",
        max_x=arguments.max_x,
        max_y=arguments.max_y,
        dark=arguments.dark,
    )
    by_position = position.PositionChart(arguments.title, options.y, arguments.dark)
    asked = _Asked(file, options, by_position if arguments.by_position else None, arguments.chart_mean)
    return partial(_draw, asked, arguments.show)


def _draw(asked: _Asked, show: bool, records: "Sequence[ResultRecord]", errors: "Console") -> None:
    """Draw every chart that can be. Raises the first SpecError of those that cannot, after the others."""
    from evalq.plots import scatter
    from evalq.show.console import say

    if not any(record.status == "ok" for record in records):
        say(errors, "no chart: no model was scored")
        return
    failed = None
    for chart in _charts(asked, records):
        of_text = f" of {chart.text}" if chart.text else ""
        if chart.why_not:
            say(errors, f"no chart{of_text}: {chart.why_not}")
            continue
        try:
            figure = chart.draw()
        except SpecError as error:
            what = f"chart{of_text}: {error.message}" if of_text else error.message
            failed = failed or SpecError(what, error.remedy)
            continue
        scatter.save(figure, chart.file)
        say(errors, f"chart: {chart.file}")
        if show:
            scatter.show(figure)
    if failed is not None:
        raise failed


def _charts(asked: _Asked, records: "Sequence[ResultRecord]") -> Iterator[_Chart]:
    """One of the means, or one for each text."""
    from evalq.plots import scatter
    from evalq.results.means import mean_over_texts
    from evalq.results.texts import by_text

    several = by_text(records)
    if several is None:
        yield _of_text(asked, "", asked.file, records)
    elif asked.mean:
        means = [mean_over_texts(of_model, several.names) for of_model in several.models]
        there = any(mean.kld if asked.options.y == "kld" else mean.ln_ratio for mean in means)
        why_not = "" if there else "no model has a mean over all texts; the lines above say why"
        why_not = why_not or _no_speed(asked, records)
        yield _Chart("", asked.file, partial(scatter.draw_means, several, asked.options), why_not)
    else:
        for (name, of_text), file in zip(
            several.texts.items(), _files_of(asked.file, several.names), strict=True
        ):
            yield _of_text(asked, name, file, of_text)


def _of_text(asked: _Asked, name: str, file: Path, records: "Sequence[ResultRecord]") -> _Chart:
    """The chart of one text."""
    from evalq.plots import position, scatter
    from evalq.results.floor import kld_of
    from evalq.show.positions import NONE

    title = asked.options.title
    if name and title:
        title = f"{title}: {name}"
    why_not = ""
    if not any(record.status == "ok" for record in records):
        why_not = "no model was scored"
    elif asked.options.y == "kld" and not any(kld_of(record) for record in records):
        why_not = "no model has a KL divergence; the lines above say why"
    elif asked.position is not None and not any(record.by_position for record in records):
        why_not = NONE
    elif asked.position is None:
        why_not = _no_speed(asked, records)
    if asked.position is not None:
        by_position = partial(position.draw, records, replace(asked.position, title=title))
        return _Chart(name, file, by_position, why_not)
    drawn = partial(scatter.draw, records, replace(asked.options, title=title))
    return _Chart(name, file, drawn, why_not)


def _x_axis(arguments: argparse.Namespace) -> "Axis":
    if arguments.chart_speed is not None:
        return "speed" if arguments.chart_speed == "one" else "speed-batch"
    return "vram" if arguments.vram else "kv" if arguments.kv_bits else "bpw"


def _no_speed(asked: _Asked, records: "Sequence[ResultRecord]") -> str:
    """Why there is no chart against speed, "" where there is one, or none was asked for."""
    from evalq.plots.across import ACROSS

    across = ACROSS[asked.options.x]
    if not across.more_is_better or any(across.value(record) for record in records):
        return ""
    return "no model's speed was measured; the notes above say why"


def _files_of(file: Path, names: Sequence[str]) -> list[Path]:
    """A file for each text, named after it."""
    slugs = [_slug(name) or "text" for name in names]
    endings = [slug if slugs.count(slug) == 1 else f"{slug}-{number}" for number, slug in enumerate(slugs, 1)]
    return [file.with_stem(f"{file.stem}-{ending}") for ending in endings]


def _slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:80]


def _default_file(arguments: argparse.Namespace) -> Path:
    """In plots/out, named after the specs; the names of texts follow where each has a chart."""
    texts = arguments.dataspec if len(arguments.dataspec) == 1 or arguments.chart_mean else []
    slug = _slug("_".join(Path(name).stem for name in (*texts, *arguments.modelspec)))
    chosen = (
        ("-kld", arguments.chart_kld),
        ("-position", arguments.by_position),
        ("-vram", arguments.vram),
        ("-kv", arguments.kv_bits),
        ("-speed", arguments.chart_speed == "one"),
        ("-speed-batch", arguments.chart_speed == "batch"),
        ("-dark", arguments.dark),
        ("-mean", arguments.chart_mean),
    )
    suffix = "".join(name for name, is_chosen in chosen if is_chosen)
    return Path("plots") / "out" / f"{slug}{suffix}.png"
