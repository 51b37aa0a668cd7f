"""The lines of a vLLM log, and where one engine ends and the next begins.

A line may carry, from the left: what docker compose or Kubernetes put before it, the process that printed it
(`(Worker_TP0 pid=7957)`, `(VllmWorker rank=1 pid=12)`; Ray nests them, the innermost counts), and the header
of vLLM's logger (`INFO 11-21 02:38:58 [model_runner.py:305]`, no brackets before 0.7). What is left is the
message. A run starts where the engine's arguments are printed, or at "Initializing a V1 LLM engine"; an
engine that fails before the latter has the former alone.

Source: `vllm/logger.py`, `decorate_logs` and `_add_prefix` of vLLM 0.8 to 0.33.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evalq.errors import SpecError

INIT = re.compile(
    r"Initializing an? (?:(?P<generation>V\d) )?LLM engine \(v(?P<version>[^)]+)\) with config: "
)
ARGUMENTS = re.compile(r"^(?:non-default args: |args: Namespace\(|vLLM API server version )")

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_LEAD = re.compile(r"^(?:\S+\s+\|\s|\d{4}-\d\d-\d\dT\S+\s)+")
_PROCESS = re.compile(r"^\(((?:[^()]*\s)?pid=\d+[^()]*)\)\s?|^(\[rank\d+\]): ?")
_HEADER = re.compile(
    r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[?[^\]\s]+:\d+\]? ?"
)
_NO_START = (
    'a vLLM log holds "Initializing a V1 LLM engine (v...) with config: ..." or "non-default args: ..."'
)


@dataclass(frozen=True)
class LogLine:
    """One line of a log.

    Args:
        number: from 1, in its file.
        process: who printed it, as in the log; empty where it does not say.
        message: without colours, process and header.
    """

    number: int
    process: str
    message: str


def read_lines(name: str) -> list[LogLine]:
    """Every line of a file, or of standard input for "-".

    Raises:
        SpecError: it cannot be read, is empty or is not text.
    """
    where = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror or error}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what PowerShell's ">" writes
        text = data.decode("utf-16", errors="replace")
    elif b"\0" in data:
        raise SpecError(f"{where}: a binary file, not a log", "give the text that vLLM printed")
    else:
        text = data.decode("utf-8", errors="replace")
    if not text.strip():
        raise SpecError(f"{where}: empty", "give the text that vLLM printed (standard error too: 2>&1)")
    # A progress bar overwrites itself with carriage returns: several messages on one line.
    return [
        parse_line(number, part)
        for number, line in enumerate(text.split("\n"), 1)
        for part in line.rstrip("\r").split("\r")
    ]


def parse_line(number: int, text: str) -> LogLine:
    """Take a line apart."""
    rest = _LEAD.sub("", _ANSI.sub("", text).rstrip(), count=1)
    process = ""
    while match := _PROCESS.match(rest):
        process, rest = match[1] or match[2], rest[match.end() :]
    return LogLine(number, process, _HEADER.sub("", rest, count=1))


def split_runs(lines: Iterable[LogLine], where: str) -> list[list[LogLine]]:
    """The lines of each run, from its first sign of an engine to the next one's.

    Raises:
        SpecError: no engine starts here.
    """
    runs: list[list[LogLine]] = []
    state = _State()
    for line in lines:
        if state.starts_run(line):
            runs.append([])
            state = _State()
        state.note(line)
        if runs:
            runs[-1].append(line)
    if not runs:
        raise SpecError(f"{where}: no engine starts in this log", _NO_START)
    return runs


class _State:
    """What the current run has shown so far."""

    def __init__(self) -> None:
        self.arguments, self.failed = False, False
        self.engines: set[str] = set()

    def starts_run(self, line: LogLine) -> bool:
        if ARGUMENTS.match(line.message):
            return not self.arguments or self.failed or bool(self.engines)
        # Engines of one data-parallel start differ in name, those of two starts do not.
        name = line.process.split(" ")[0]
        another = name.startswith("EngineCore_DP") and name not in self.engines
        return bool(INIT.search(line.message)) and (
            bool(self.engines) and not another or not self.engines and not self.arguments
        )

    def note(self, line: LogLine) -> None:
        if INIT.search(line.message):
            self.engines.add(line.process.split(" ")[0])
        self.arguments = self.arguments or bool(ARGUMENTS.match(line.message))
        self.failed = self.failed or line.message.startswith("Traceback (most recent call last)")


def values(lines: Iterable[LogLine], pattern: re.Pattern[str]) -> Iterator[tuple[LogLine, re.Match[str]]]:
    """Every line in which the pattern is found, with the match."""
    for line in lines:
        if match := pattern.search(line.message):
            yield line, match
