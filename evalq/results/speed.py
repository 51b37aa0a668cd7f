"""How fast a model is, beside how good it is: repeated figures, each with its spread.

Generating is the most probable token each time, by the engine's own cache. Its tokens per second are those
after the first new token of every prompt, so that the time a prompt takes is told apart from it: that is the
time to the first token. Scoring is scored tokens per second, as a comparison scores, warm-up left out.

A figure belongs to the machine, the engine's options and the lengths that it was measured with, so all of
them are in the key that it is kept under. Agrees with `llama-bench -d PROMPT -n NEW`, `vllm bench latency`.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evalq.errors import SpecError
from evalq.files import read_json, write_json

Figure = Literal["generation", "generation_batch", "first_token_seconds", "scoring"]
FIGURES: tuple[Figure, ...] = ("generation", "generation_batch", "first_token_seconds", "scoring")
# Figures that come out of one run of the engine.
Part = Literal["one", "batch", "scoring"]
PARTS: dict[Part, tuple[Figure, ...]] = {
    "one": ("generation", "first_token_seconds"),
    "batch": ("generation_batch",),
    "scoring": ("scoring",),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpeedSettings(_Frozen):
    """What is measured. The same for every engine."""

    prompt_tokens: int = Field(default=512, description="of every prompt, and of every window that is scored")
    new_tokens: int = Field(default=128, description="generated after every prompt; no token ends it sooner")
    batch: int = Field(description="prompts at once in the large batch")
    windows: int = Field(description="scored at a time")
    repeats: int = Field(default=3, description="of each figure")

    def require_possible(self) -> None:
        """Raise SpecError for sizes that nothing can be measured with."""
        least = {"prompt_tokens": 2, "new_tokens": 2, "batch": 1, "windows": 1, "repeats": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                what = name.replace("_", " ")
                raise SpecError(f"speed: {what} is {getattr(self, name)}, at least {smallest} is needed")

    @property
    def positions(self) -> int:
        """That generating needs: the last new token is never fed back."""
        return self.prompt_tokens + self.new_tokens - 1


class Repeated(_Frozen):
    """One figure, measured several times."""

    median: float
    low: float = Field(description="the smallest of the repetitions")
    high: float = Field(description="the largest of them")
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Repeated":
        """The middle and the ends of at least one value."""
        middle = statistics.median(values)
        return cls(median=middle, low=min(values), high=max(values), repeats=len(values))


class Speed(_Frozen):
    """How fast a model is on one machine."""

    generation: Repeated | None = Field(
        default=None, description="new tokens per second of one prompt, after the first"
    )
    generation_batch: Repeated | None = Field(
        default=None, description="new tokens per second of all prompts of the batch, after the first of each"
    )
    first_token_seconds: Repeated | None = Field(
        default=None, description="from a prompt to its first new token, seconds"
    )
    scoring: Repeated | None = Field(default=None, description="scored tokens per second")
    settings: SpeedSettings = Field(description="lengths, batch and repetitions")
    device: str | None = Field(default=None, description="as the engine calls it")
    not_measured: dict[str, str] = Field(default={}, description="figure -> why there is none")

    def get(self, figure: str) -> Repeated | None:
        """One of FIGURES."""
        found: Repeated | None = getattr(self, figure)
        return found


class KeptSpeed:
    """The figures of one model, machine and settings in the store; whatever was measured stays."""

    def __init__(self, file: Path, belongs_to: Mapping[str, Any]) -> None:
        """`belongs_to` is everything that the figures depend on, kept beside them for a reader."""
        self.file = file
        self._belongs_to = dict(belongs_to)

    def read(self, settings: SpeedSettings) -> Speed:
        """What is there; nothing measured where it cannot be read."""
        found = read_json(self.file)
        try:
            kept = Speed.model_validate(found.get("speed") if isinstance(found, dict) else None)
        except (ValidationError, RecursionError):
            return Speed(settings=settings)
        return kept if kept.settings == settings else Speed(settings=settings)

    def write(self, speed: Speed) -> None:
        """Keep it, without the reasons of what could not be measured: they may be gone next time.

        Raises:
            StoreError: it cannot be written.
        """
        plain = speed.model_copy(update={"not_measured": {}}).model_dump()
        write_json(self.file, {"belongs_to": self._belongs_to, "speed": plain})
