"""Where output goes, and sentences with text from elsewhere in them."""

from rich.console import Console
from rich.text import Text

from evalq.show.plain import plain


def output() -> Console:
    """Standard output."""
    return Console()


def say(console: Console, *parts: str | tuple[str, str]) -> None:
    """One line, made safe to show; a part may be (text, style). A terminal wraps it, nothing else does."""
    pieces = [(part, "") if isinstance(part, str) else part for part in parts]
    line = Text.assemble(*((plain(text), style) for text, style in pieces))
    console.print(line, soft_wrap=True)
