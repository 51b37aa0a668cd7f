"""Why a run failed: the first exception that is a cause, not one that reports another process's.

An exception in a worker is printed by the worker, by the engine core and by the program, each with words of
its own ("Engine core initialization failed. See root cause above."). Where only such reports are left, a
process ended without a word, which is what a kill by the system looks like. An exception that vLLM got over,
in a run whose engine became ready, is no failure. A KV cache of less than nothing is one even where the log
ends before the error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from evalq.failures import classify, from_exit
from evalq.vllm_memory.log import LogLine
from evalq.vllm_memory.run import Failure

READY = re.compile(r"init engine \(profile, create kv cache, warmup model\) took")

_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)(?:: |$)|^Failed to load model - ")
_REPORTS_ANOTHER = re.compile(
    r"[Ss]ee (?:root cause above|stack trace)|Engine process failed to start|EngineDeadError|worker died"
    r"|died unexpectedly|Executor failed|cancelled|^BrokenPipeError|^ConnectionResetError|^EOFError"
)
_SILENT = "No line above says why: a process was killed, or the log lacks its lines."
_ENGINE_DIED = re.compile(r"encountered a fatal error|EngineDeadError|background loop has errored")
_EXIT = re.compile(
    r"(?:died|Failed core proc).*?-(?P<code>6|7|8|9|11|15)\b"
    r"|(?:^|\d )(?P<killed>Killed)\b|(?P<crash>Segmentation fault)"
)
_NEXT = re.compile(r"^(?:Traceback |During handling |The above exception |Process )")
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_GIB = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}


@dataclass(frozen=True)
class _Raised:
    """An exception with the lines that belong to its message."""

    line: LogLine
    text: str

    @property
    def message(self) -> str:
        """Its own words in one line; pydantic puts them below its count of errors."""
        first, *more = self.text.split("\n")
        if "validation error for" in first and more:
            first = re.sub(r" \[type=.*", "", more[0].strip()).replace("Value error, ", "ValueError: ", 1)
        return re.sub(r"^Failed to load model .*\(original error: (.*)\)$", r"\1", first)


def find_failure(lines: Sequence[LogLine], kv_cache_gib: float | None) -> Failure | None:
    """The failure of one run, None where it has none.

    Args:
        lines: of the run.
        kv_cache_gib: what the log says was left for the KV cache.
    """
    ready = next((i for i, line in enumerate(lines) if READY.search(line.message)), None)
    if ready is not None:
        return _after_ready(lines[ready + 1 :])
    raised = _raised(lines)
    causes = [one for one in raised if not _REPORTS_ANOTHER.search(one.line.message)]
    known = next((one for one in causes if classify(one.text, "load") != "engine_error"), None)
    if known is not None:
        return _failure(known, "load")
    if ended := _ended_by_signal(lines, "load"):
        return ended
    if causes:
        return _failure(causes[0], "load")
    if kv_cache_gib is not None and kv_cache_gib <= 0:
        return Failure("no_kv_memory", f"Available KV cache memory: {kv_cache_gib:g} GiB")
    if raised:
        return Failure("host_oom_or_killed", f"{raised[0].message} {_SILENT}", raised[0].line.number)
    return None


def _after_ready(lines: Sequence[LogLine]) -> Failure | None:
    """Only what ends the engine: a server also logs requests that it refused."""
    raised = _raised(lines)
    out_of_memory = next((one for one in raised if classify(one.text, "forward") == "oom_forward"), None)
    if out_of_memory is not None:
        return _failure(out_of_memory, "forward")
    if not any(_ENGINE_DIED.search(line.message) for line in lines):
        return None
    causes = [one for one in raised if not _REPORTS_ANOTHER.search(one.line.message)]
    ended = _ended_by_signal(lines, "forward")
    if ended or not (causes or raised):
        return ended
    return _failure((causes or raised)[0], "forward")


def _raised(lines: Sequence[LogLine]) -> list[_Raised]:
    """Every exception in the order of the log."""
    found = []
    for i, line in enumerate(lines):
        if _EXCEPTION.match(line.message):
            near = (other.message for other in lines[i + 1 : i + 12] if other.process == line.process)
            more = takewhile(lambda text: not _EXCEPTION.match(text) and not _NEXT.match(text), near)
            found.append(_Raised(line, "\n".join([line.message, *islice(more, 3)])))
    return found


def _ended_by_signal(lines: Sequence[LogLine], stage: str) -> Failure | None:
    """A process that ended without a word."""
    for line in lines:
        match = _EXIT.search(line.message)
        if match:
            code = 9 if match["killed"] else 11 if match["crash"] else int(match["code"])
            error = from_exit(-code, stage, "")
            return Failure(error.category, f"{error.message}: {line.message}", line.number)
    return None


def _failure(raised: _Raised, stage: str) -> Failure:
    text = raised.text
    kv_cache = re.search(
        r"\((\S+) GiB KV cache is needed, which is larger than the available KV cache memory \((\S+) GiB",
        text,
    )
    longest = re.search(r"the estimated maximum model length is (\d+)", text)
    if longest is None:  # V0
        longest = re.search(r"maximum number of tokens that can be stored in KV cache \((\d+)\)", text)
    return Failure(
        classify(text, stage),
        raised.message,
        raised.line.number,
        tried_gib=_size(text, rf"Tried to allocate {_SIZE}"),
        free_gib=_size(text, rf"of which {_SIZE} is free"),
        in_use_gib=_size(text, rf".*\bhas {_SIZE} memory in use"),
        pytorch_gib=_size(text, rf"Of the allocated memory {_SIZE} is allocated by PyTorch"),
        needed_gib=float(kv_cache[1]) if kv_cache else None,
        available_gib=float(kv_cache[2]) if kv_cache else None,
        longest=int(longest[1]) if longest else None,
    )


def _size(text: str, pattern: str) -> float | None:
    match = re.search(pattern, text)
    return float(match[1]) * _GIB[match[2]] if match else None
