"""A finished chart into a file or onto the screen.

Files are reproducible: no date, no version, fixed ids; the same records give the same bytes. They are
written under a temporary name beside the target and renamed, so that a chart is there whole or not at all.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from evalq.errors import SpecError, StoreError
from evalq.plots.page import families, quiet_glyphs
from evalq.plots.style import DPI, SVG_FAMILIES

# What each format records about its making unless told not to.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_REPRODUCIBLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "evalq", "pdf.fonttype": 42}


def save(figure: Figure, path: Path) -> None:
    """Write a chart as PNG (200 dpi), SVG (text stays text) or PDF, by the suffix of the name.

    Folders that are missing are made.

    Raises:
        SpecError: another suffix.
        StoreError: the file cannot be written; nothing is left behind.
    """
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise SpecError(
            f'{path}: a chart cannot be written as "{path.suffix}"', f"end the name in {', '.join(_METADATA)}"
        )
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_REPRODUCIBLE), quiet_glyphs():
            figure.savefig(beside, format=suffix[1:], dpi=DPI, metadata=_METADATA[suffix])
        if suffix == ".svg":
            _add_fallback_fonts(beside)
        os.replace(beside, path)
    except OSError as error:
        raise StoreError(
            f"{path}: the chart cannot be written: {error.strerror or error}", "name another file with -o"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def show(figure: Figure) -> None:
    """Open a chart in a window and wait until it is closed.

    Raises:
        SpecError: there is no display, or matplotlib has no toolkit to open a window with.
    """
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        raise SpecError("no window can be shown: there is no display", "write a file with -o instead")
    # Here alone: pyplot is slow to import and looks for a display.
    from matplotlib import pyplot

    try:
        window = pyplot.figure(figsize=figure.get_size_inches())
    except ImportError as error:
        raise SpecError(f"no window can be shown: {error}", "write a file with -o instead") from error
    if matplotlib.get_backend().lower() in ("agg", "svg", "pdf", "ps", "cairo", "template"):
        pyplot.close(window)
        raise SpecError(
            "no window can be shown: matplotlib found no window toolkit",
            "install PyQt6 (pip install PyQt6), or write a file with -o instead",
        )
    window.canvas.figure = figure
    figure.set_canvas(window.canvas)
    with quiet_glyphs():
        pyplot.show()


def _add_fallback_fonts(path: Path) -> None:
    """Name fonts of the same widths for viewers without the one that was measured."""
    measured = ", ".join(f"'{family}'" for family in families())
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(measured, SVG_FAMILIES), encoding="utf-8")
