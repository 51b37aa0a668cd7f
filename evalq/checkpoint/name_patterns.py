"""Regular expressions that stand in a model's files, matched with tensors' names under a limit of time.

The files come from strangers, and the time of a search can grow exponentially with the length of a name. The
standard library cannot stop a search; `regex` can (https://github.com/mrabarnett/mrab-regex).
"""

from typing import Any

import regex

LENGTH_MAX = 1000
COUNT_MAX = 2000
_SECONDS = 0.5
_SLOW_MAX = 4


class NamePatterns:
    """The patterns of one file. One that is none, or is too slow, matches nothing and is in `refused`."""

    def __init__(self) -> None:
        """Patterns are compiled when they are first asked for."""
        self._compiled: dict[str, Any] = {}
        self._slow = 0
        self.refused: set[str] = set()

    def found(self, pattern: str, name: str) -> bool:
        """Whether the pattern is found anywhere in the name."""
        compiled = self._compile(pattern)
        if compiled is None:
            return False
        try:
            return compiled.search(name, timeout=_SECONDS) is not None
        except TimeoutError:
            self._slow += 1
            self._refuse(pattern)
            return False

    def _compile(self, pattern: str) -> Any:
        if pattern not in self._compiled:
            allowed = len(pattern) <= LENGTH_MAX and len(self._compiled) < COUNT_MAX
            try:
                self._compiled[pattern] = regex.compile(pattern) if allowed else None
            except (regex.error, RecursionError, OverflowError, ValueError):
                self._compiled[pattern] = None
            if self._compiled[pattern] is None:
                self._refuse(pattern)
        return None if self._slow >= _SLOW_MAX else self._compiled[pattern]

    def _refuse(self, pattern: str) -> None:
        self._compiled[pattern] = None
        self.refused.add(pattern)
