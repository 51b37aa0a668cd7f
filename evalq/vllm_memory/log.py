"""The lines of a vLLM log, and where one engine ends and the next begins.

A line may carry, from the left: what docker compose or Kubernetes put before it, the process that printed it
(`(Worker_TP0 pid=7957)`, `(VllmWorker rank=1 pid=12)`; Ray nests them, the innermost counts), and the header
of vLLM's logger (`INFO 11-21 02:38:58 [model_runner.py:305]`, no brackets before 0.7). What is left is the
message. A run starts where the engine's arguments are printed, or at "Initializing a V1 LLM engine"; an
engine that fails before the latter has the former alone.

Logs come from anywhere, so what is kept of one is bounded: of a line its first 32,768 characters, which is
several times vLLM's longest; a log of more than 1,000,000 lines or 128 MiB is refused. No pattern
takes longer than in proportion to the length of its line.

Source: `vllm/logger.py`, `decorate_logs` and `_add_prefix` of vLLM 0.8 to 0.33.
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evalq.errors import SpecError

INIT = re.compile(
    r"Initializing an? (?:(?P<generation>V\d) )?LLM engine \(v(?P<version>[^()\s]{1,80})\) with config: "
)
ARGUMENTS = re.compile(r"^(?:non-default args: |args: Namespace\(|vLLM API server version )")
# A number as vLLM and PyTorch print it. Without an end, "1.2.3" and 400 digits would be numbers too.
NUMBER = r"-?(?:[0-9]{1,18}+(?:,[0-9]{3}){0,4}+(?:\.[0-9]{1,20}+)?+|\.[0-9]{1,20}+)"

LINE_CHARACTERS_MAX = 32_768
LINES_MAX = 1_000_000
BYTES_MAX = 128 * 2**20

_ANSI = re.compile(r"\x1b\[[0-9;?]*+[ -/]*+[@-~]")
_LEAD = re.compile(r"(?:\S++\s++\|\s|\d{4}-\d\d-\d\dT\S++\s)++")
_PROCESS = re.compile(r"\((?P<inside>[^()]*+)\)\s?|(?P<rank>\[rank\d++\]): ?")
_PID = re.compile(r"(?:^|\s)pid=\d")
_HEADER = re.compile(
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d++)? \[?[^\]\s]+:\d++\]? ?"
)
_NO_START = (
    'a vLLM log holds "Initializing a V1 LLM engine (v...) with config: ..." or "non-default args: ..."'
)
_TOO_LONG = "give the part around one start, or leave requests out: grep -v POST LOG | evalq memory -"


@dataclass(frozen=True, slots=True)
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
    """Every line with something on it of a file, or of standard input for "-".

    Raises:
        SpecError: it cannot be read, is empty, too long or no text.
    """
    where = "standard input" if name == "-" else name
    try:
        if name == "-":
            data = sys.stdin.buffer.read(BYTES_MAX + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(BYTES_MAX + 1)
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise SpecError(f"{where}: cannot be read: {error}") from None
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # what PowerShell's ">" writes
    if b"\0" in data and not is_utf16:
        raise SpecError(f"{where}: a binary file, not a log", "give the text that vLLM printed")
    if len(data) > BYTES_MAX:
        raise SpecError(f"{where}: more than {BYTES_MAX // 2**20} MiB", _TOO_LONG)
    lines = _lines(data, "utf-16" if is_utf16 else "utf-8", where)
    if not lines:
        raise SpecError(f"{where}: empty", "give the text that vLLM printed (standard error too: 2>&1)")
    return lines


def _lines(data: bytes, encoding: str, where: str) -> list[LogLine]:
    """The lines of a text. Raises SpecError for too many."""
    found: list[LogLine] = []
    text = io.TextIOWrapper(io.BytesIO(data), encoding, errors="replace", newline="\n")
    for number, line in enumerate(text, 1):
        # A progress bar overwrites itself with carriage returns: several messages on one line.
        found += (parse_line(number, part) for part in line.split("\r") if part and not part.isspace())
        if len(found) > LINES_MAX:
            raise SpecError(f"{where}: more than {LINES_MAX:,} lines", _TOO_LONG)
    return found


def parse_line(number: int, text: str) -> LogLine:
    """Split a line into process and message; what is beyond `LINE_CHARACTERS_MAX` is left out."""
    rest = _ANSI.sub("", text[:LINE_CHARACTERS_MAX]).rstrip()
    at, process = _end(_LEAD, rest, 0), ""
    while match := _PROCESS.match(rest, at):
        named = match["rank"] or (match["inside"] if _PID.search(match["inside"]) else None)
        if named is None:
            break
        process, at = named, match.end()
    return LogLine(number, process, rest[_end(_HEADER, rest, at) :])


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a match at this place ends; the place itself without one."""
    match = pattern.match(text, at)
    return match.end() if match else at


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


def number(text: str) -> float:
    """What `NUMBER` matched."""
    return float(text.replace(",", ""))


def values(lines: Iterable[LogLine], pattern: re.Pattern[str]) -> Iterator[tuple[LogLine, re.Match[str]]]:
    """Every line in which the pattern is found, with the match."""
    for line in lines:
        if match := pattern.search(line.message):
            yield line, match
