"""What a person sees of a conversion: a bar on a terminal, one line at the end."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track as rich_track

from evalq.show.plain import plain

if TYPE_CHECKING:
    from evalq.checkpoint.safetensors import Logical
    from evalq.convert.dense import Written


def track(weights: Iterable["Logical"]) -> Iterable["Logical"]:
    """Count the weights on standard error, on a terminal."""
    console = Console(stderr=True)
    listed = list(weights)
    return rich_track(
        listed, "writing weights", console=console, transient=True, disable=not console.is_terminal
    )


def report(target: Path, written: "Written") -> None:
    """The last line."""
    dense = f"{written.dequantized} of them dequantized" if written.dequantized else "none was quantized"
    merged = f", {written.changed} changed by the adapter" if written.changed else ""
    line = f"{target}: {written.weights} weights, {dense}{merged}, {written.bytes / 2**30:.2f} GiB"
    print(plain(line), file=sys.stderr)
