"""What a person sees while models are scored: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from evalq.results.record import ResultRecord
from evalq.run.process import Event
from evalq.show.console import say
from evalq.show.numbers import number
from evalq.show.plain import plain

PLAIN_EVERY_SECONDS = 15.0


class ConsoleReporter:
    """Reports on `console`, which should write to standard error. Use it as a context manager."""

    def __init__(self, console: Console, models: int, quiet: bool) -> None:
        """`models` is how many will come; `quiet` shows nothing at all."""
        self._console, self._models, self._quiet = console, models, quiet
        self._number, self._label = 0, ""
        self._texts: list[str] = []
        self._text: str | None = None
        self._printed, self._resumed_at = 0.0, 0
        self._task: TaskID | None = None
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("windows  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Self:
        """Start the live line."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the live line."""
        self._live.stop()

    def status(self, text: str) -> None:
        """A line of its own."""
        self._say(text)

    def model(self, label: str, texts: Mapping[str, int]) -> None:
        """The next model, the names of its texts and how many windows each has."""
        self._end_task()
        self._number, self._label = self._number + 1, label
        self._texts, self._text = list(texts), None
        total = sum(texts.values())
        self._task = self._live.add_task(self._name("starting"), total=total, rate="")
        self._printed = time.monotonic()

    def event(self, event: Event) -> None:
        """A worker's word: waiting, loading, loaded, text, progress."""
        if self._task is None:
            return
        kind = event["event"]
        if kind == "waiting":
            self._say(self._name("another run is scoring this model: waiting for it"))
        elif kind in ("loading", "loaded"):
            self._live.update(self._task, description=self._name(kind if kind == "loading" else "scoring"))
            if kind == "loaded":
                self._plain(f"loaded in {event['seconds']:.1f} s on {event['device']}", at_once=True)
        elif kind == "text":
            self._text = str(event["name"])
            self._live.update(self._task, description=self._name("scoring"))
        elif kind == "progress":
            rate = event["scored"] / event["seconds"] if event["seconds"] else 0.0
            shown = f"{number(rate, 0)} tok/s" if rate else ""
            self._live.update(self._task, completed=event["windows"], total=event["of"], rate=shown)
            if not event["scored"]:
                self._resumed_at = event["windows"]
            scored = event["windows"] - self._resumed_at
            left = (event["of"] - event["windows"]) * event["seconds"] / max(1, scored)
            self._plain(
                f"{event['windows']}/{event['of']} windows  {shown}  {number(left, 0)} s left", at_once=False
            )

    def record(self, record: ResultRecord, cached: bool, text: str) -> None:
        """The model's result on a text."""
        self._end_task()
        self._text = text
        if record.error:
            self._say(self._name(f"failed: {record.error.message}"))
            return
        found = f"PPL {number(record.headline_ppl, 4)}"
        if record.headline_ppl is None:
            found = f"scored, without a perplexity per {record.unit}"
        speed = "" if record.tokens_per_second is None else f"  {number(record.tokens_per_second, 0)} tok/s"
        self._say(self._name(f"{found}{'  (stored)' if cached else speed}"))

    def _end_task(self) -> None:
        if self._task is not None:
            self._live.remove_task(self._task)
            self._task = None

    def _name(self, what: str) -> str:
        """Which model, and which text where there are several."""
        of_text = ""
        if len(self._texts) > 1 and self._text in self._texts:
            of_text = f", text {self._texts.index(self._text) + 1}/{len(self._texts)} {self._text}"
        return plain(f"[{self._number}/{self._models}] {self._label}{of_text}: {what}")

    def _plain(self, text: str, at_once: bool) -> None:
        if self._console.is_terminal or not (
            at_once or time.monotonic() - self._printed > PLAIN_EVERY_SECONDS
        ):
            return
        self._printed = time.monotonic()
        self._say(self._name(text))

    def _say(self, text: str) -> None:
        if not self._quiet:
            say(self._console, text)
