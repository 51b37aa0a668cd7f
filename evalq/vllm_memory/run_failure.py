"""Why a run failed: the first exception that is a cause, not one that reports another process's.

An exception in a worker is printed by the worker, by the engine core and by the program, each with words of
its own ("Engine core initialization failed. See root cause above."). Where only such reports are left, a
process ended without an error of its own, which is what a kill by the system looks like. An exception before
the engine became ready is no failure: vLLM recovered from it. A KV cache of less than nothing is one even
where the log ends before the error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from evalq.engine.failures import classify, from_exit
from evalq.vllm_memory.engine_run import RunFailure
from evalq.vllm_memory.log import NUMBER, LogLine, number

READY = re.compile(r"init engine \(profile, create kv cache, warmup model\) took")

# Which line an exception begins with; module and class of one are never longer than this.
_EXCEPTION = re.compile(r"^[\w.]{0,200}(?:Error|Exception)(?:: |$)|^Failed to load model - ")
_REPORTS_ANOTHER = re.compile(
    r"[Ss]ee (?:root cause above|stack trace)|Engine process failed to start|EngineDeadError|worker died"
    r"|died unexpectedly|Executor failed|cancelled|^BrokenPipeError|^ConnectionResetError|^EOFError"
)
_SILENT = "No line above says why: a process was killed, or the log lacks its lines."
_ENGINE_DIED = re.compile(r"encountered a fatal error|EngineDeadError|background loop has errored")
_DIED = re.compile(r"died|Failed core proc")
_SIGNAL = re.compile(r"-(6|7|8|9|11|15)\b")
_KILLED = re.compile(r"(?:^|\d )Killed\b")
_NEXT = re.compile(r"^(?:Traceback |During handling |The above exception |Process )")
_SIZE = rf"({NUMBER}) (bytes|KiB|MiB|GiB)"
_TRIED = re.compile(rf"Tried to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_IN_USE = re.compile(rf"\bhas {_SIZE} memory in use")
_PYTORCH = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_KV_CACHE = re.compile(
    rf"\(({NUMBER}) GiB KV cache is needed, "
    rf"which is larger than the available KV cache memory \(({NUMBER}) GiB"
)
_LONGEST = re.compile(
    r"the estimated maximum model length is ([0-9]{1,15})(?![.,]?\w)"
    r"|maximum number of tokens that can be stored in KV cache \(([0-9]{1,15})\)"  # V0
)
_GIB = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}


@dataclass(frozen=True)
class _Raised:
    """An exception with the lines that belong to its message."""

    line: LogLine
    text: str

    @property
    def message(self) -> str:
        """The error in one line. pydantic prints a count of errors, and the error in the line below."""
        first, *more = self.text.split("\n")
        if "validation error for" in first and more:
            first = more[0].strip().partition(" [type=")[0].replace("Value error, ", "ValueError: ", 1)
        _, mark, original = first.rpartition("(original error: ")
        if mark and first.startswith("Failed to load model ") and original.endswith(")"):
            return original.removesuffix(")")
        return first


def find_failure(lines: Sequence[LogLine], kv_cache_gib: float | None) -> RunFailure | None:
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
        return RunFailure("no_kv_memory", f"Available KV cache memory: {kv_cache_gib:g} GiB")
    if raised:
        return RunFailure("host_oom_or_killed", f"{raised[0].message} {_SILENT}", raised[0].line.number)
    return None


def _after_ready(lines: Sequence[LogLine]) -> RunFailure | None:
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


def _ended_by_signal(lines: Sequence[LogLine], stage: str) -> RunFailure | None:
    """The first process that a signal ended, where a line says so."""
    for line in lines:
        if code := _signal(line.message):
            error = from_exit(-code, stage, "")
            return RunFailure(error.category, f"{error.message}: {line.message}", line.number)
    return None


def _signal(message: str) -> int | None:
    """The signal that a line says ended a process."""
    # After the first of these words: a pattern that tried each of them would be quadratic.
    died = _DIED.search(message)
    if died and (code := _SIGNAL.search(message, died.end())):
        return int(code[1])
    if _KILLED.search(message):
        return 9
    return 11 if "Segmentation fault" in message else None


def _failure(raised: _Raised, stage: str) -> RunFailure:
    text = raised.text
    kv_cache, longest = _KV_CACHE.search(text), _LONGEST.search(text)
    return RunFailure(
        classify(text, stage),
        raised.message,
        raised.line.number,
        tried_gib=_last_size(text, _TRIED),
        free_gib=_last_size(text, _FREE),
        in_use_gib=_last_size(text, _IN_USE),
        pytorch_gib=_last_size(text, _PYTORCH),
        needed_gib=number(kv_cache[1]) if kv_cache else None,
        available_gib=number(kv_cache[2]) if kv_cache else None,
        longest=int(longest[1] or longest[2]) if longest else None,
    )


def _last_size(text: str, pattern: re.Pattern[str]) -> float | None:
    """The last size that the pattern finds, GiB: the process's own memory stands after that of others."""
    sizes = [number(found[1]) * _GIB[found[2]] for found in pattern.finditer(text)]
    return sizes[-1] if sizes else None
