"""What a person should know before trusting a checkpoint's scores."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault of a checkpoint.

    Args:
        name: stable and short, "scale-not-finite".
        tensor: the tensor, module or file it is about; of several the first.
        message: one line that names it too, and how many more have the same fault.
        severity: "error" where the files contradict themselves or their config, so that no engine can get
            this model right: it is not scored unless its spec says so; "warning" where some engines go wrong
            or a rule of thumb says that a person should look: a note of the result.
    """

    name: str
    tensor: str
    message: str
    severity: Severity

    def __str__(self) -> str:
        """As notes of a result show it."""
        return f"{self.name}: {self.message}"
