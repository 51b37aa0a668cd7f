"""The child process that holds an engine: one job on standard input, events as JSON lines on standard output.

A model that crashes, hangs or runs out of memory ends this process and nothing else. It may run under another
interpreter than the command line's, so it imports little: numpy, safetensors, filelock, pydantic and the
engine.

Everything the engine prints goes to standard error, which the parent keeps as worker.log. The process ends
itself when its parent is gone (standard input closes), whatever the engine is doing.
"""

import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from evalq.engine.failures import from_exception, remedy_of
from evalq.errors import EvalqError, ModelError, StoreError
from evalq.run.generating import generate
from evalq.run.job import DecodeJob, GenerateJob, ScoreJob, SpeedJob, TokenizeJob, from_line
from evalq.run.scoring import score
from evalq.run.timing import time_model
from evalq.run.tokenizing import decode, tokenize

Emit = Callable[..., None]


def main() -> int:
    """Do the job on standard input; the exit code is 0 whenever the outcome was told as an event."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _die_with_parent()
    told = _Emitter(out)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # whatever PYTHONIOENCODING says of terminals
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job = from_line(line)
        if isinstance(job, TokenizeJob):
            tokenize(job, told)
        elif isinstance(job, DecodeJob):
            decode(job, told)
        elif isinstance(job, SpeedJob):
            time_model(job, told)
        elif isinstance(job, GenerateJob):
            generate(job, told)
        else:
            assert isinstance(job, ScoreJob)
            score(job, told)
        told("done")
    except StoreError as error:
        told("store_error", message=error.message, remedy=error.remedy)
    except ModelError as error:
        told("failed", category=error.category, message=error.message, remedy=remedy_of(error))
    except EvalqError as error:
        told("data_error", message=error.message, remedy=error.remedy)
    except Exception as error:
        traceback.print_exc()
        known = from_exception(error, told.stage)
        told("failed", category=known.category, message=known.message, remedy=remedy_of(known))
    out.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit hooks that can hang or crash after the result is safe.
    os._exit(0)


class _Emitter:
    """Tells the parent what happens; `stage` is what an error falls into, "load" or "forward"."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.stage = "load"

    def __call__(self, event: str, **fields: Any) -> None:
        if event == "progress":
            self.stage = "forward"
        with contextlib.suppress(BrokenPipeError):
            self._out.write(json.dumps({"event": event, **fields}) + "\n")
            self._out.flush()


def _die_with_parent() -> None:
    """Have Linux kill this process with its parent: a thread cannot while an engine holds Python's lock."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
