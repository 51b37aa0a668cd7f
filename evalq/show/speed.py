"""Speed in tables and CSV: a column a figure, each a median with the smallest and largest repetition."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from evalq.results.speed import FIGURES, Figure, Repeated, Speed
from evalq.show.columns import MAJOR, MINOR, Column
from evalq.show.numbers import NOTHING, number

Row = TypeVar("Row")
_MS: Figure = "first_token_seconds"


def speed_columns(rows: Sequence[Row], speed_of: Callable[[Row], Speed | None]) -> list[Column[Row]]:
    """The columns of --speed; none where no row has figures."""
    found = [speed for row in rows if (speed := speed_of(row)) is not None]
    if not found:
        return []
    sizes = found[0].settings
    generated = (
        f"new tokens per second after the first of {sizes.new_tokens}, after {sizes.prompt_tokens} tokens"
    )
    spread = f"median of {sizes.repeats} (smallest to largest)"

    def column(figure: Figure, header: str, meaning: str, priority: int = MINOR) -> Column[Row]:
        return Column(
            header,
            lambda row: _cell(speed_of(row), figure),
            priority,
            right=True,
            help=f"{meaning}; {spread}",
        )

    return [
        column("generation", "gen tok/s", f"{generated} of one prompt", MAJOR),
        column("generation_batch", f"gen x{sizes.batch}", f"{generated} of {sizes.batch} prompts at once"),
        column(_MS, "first ms", f"milliseconds from {sizes.prompt_tokens} tokens to the first new one"),
        column(
            "scoring", "score tok/s", f"scored tokens per second, windows of {sizes.prompt_tokens} tokens"
        ),
    ]


def csv_speed_names() -> list[str]:
    """The columns of CSV."""
    figures = [f"speed_{figure}{end}" for figure in FIGURES for end in ("", "_low", "_high")]
    return [*figures, "speed_batch", "speed_prompt_tokens", "speed_new_tokens", "speed_device"]


def csv_speed(speed: Speed | None) -> dict[str, float | str | None]:
    """A record's cells for them."""
    if speed is None:
        return {}
    row: dict[str, float | str | None] = {
        "speed_batch": speed.settings.batch,
        "speed_prompt_tokens": speed.settings.prompt_tokens,
        "speed_new_tokens": speed.settings.new_tokens,
        "speed_device": speed.device,
    }
    for figure in FIGURES:
        found = speed.get(figure)
        if found is not None:
            name = f"speed_{figure}"
            row |= {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}
    return row


def _cell(speed: Speed | None, figure: Figure) -> str:
    found = None if speed is None else speed.get(figure)
    if found is None:
        return "" if speed is None else NOTHING
    scale = 1000.0 if figure == _MS else 1.0
    return _with_spread(found, scale)


def _with_spread(found: Repeated, scale: float) -> str:
    digits = 1 if scale * found.median < 100 else 0
    middle, low, high = (number(scale * value, digits) for value in (found.median, found.low, found.high))
    return f"{middle} ({low}–{high})" if found.repeats > 1 else middle
