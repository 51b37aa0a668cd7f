"""Everything evalq raises on purpose.

    EvalqError                what was wrong, where, and what to do about it: one line each
    ├── SpecError             a data or model spec, or the command line (exit code 2)
    ├── DataError             a text or its tokens (exit code 2)
    ├── NotComparable         records that must not share a table or a chart (exit code 2)
    ├── StoreError            results that cannot be read or written (exit code 2)
    └── ModelError            one model cannot be scored: becomes a failed record (exit code 1)

A `ModelError` carries a category of `evalq.engine.failures.CATEGORIES`; the run goes on with the next model.
"""


class EvalqError(Exception):
    """A problem with a message for the user.

    Args:
        message: what was wrong and where, in one line.
        remedy: what to do, in one line; None when the message already says it.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        """Keep the two lines apart, so that a table can show them in two places."""
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """Both in one line."""
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class SpecError(EvalqError):
    """A spec or a command line that cannot be understood."""


class DataError(EvalqError):
    """A text that cannot be had, is not what it claims, or is too short."""


class NotComparable(EvalqError):
    """Records whose perplexities measure different things."""


class StoreError(EvalqError):
    """A store that cannot be read or written. What it already holds stays as it is."""


class ModelError(EvalqError):
    """One model cannot be scored.

    Args:
        message: the engine's own words where it has some.
        category: a key of `evalq.engine.failures.CATEGORIES`.
        remedy: what to do; None takes the category's own.
    """

    def __init__(self, message: str, category: str, remedy: str | None = None) -> None:
        """Keep the category beside the two lines."""
        super().__init__(message, remedy)
        self.category = category
