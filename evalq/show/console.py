"""Where output goes: a console as wide as its terminal, or as wide as the text needs."""

from rich.console import Console


def output() -> Console:
    """Standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))
