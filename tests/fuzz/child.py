"""Runs a range of one target's inputs under limits: `python -m fuzz.child BATCH` (JSON).

Each input gives two lines on standard output: "start N", then "ended N", "refused N" or "finding N {...}".
"""

import io
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from fuzz.harness import MEMORY_BYTES_MAX, WAITING_SECONDS_MAX, Batch, Target, targets_of

from evalq.errors import EvalqError


def main(batch: Batch) -> None:
    """Run the inputs; a line of what came of each goes to the standard output that was there at the start."""
    report = os.fdopen(os.dup(1), "wb", buffering=0)
    target = targets_of(Path(batch.file))[batch.target]
    seeds = target.seeds()
    _limit_memory()
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # what a target prints is nobody's
    for number in range(batch.first, batch.end):
        data = target.input(seeds, batch.seed, number)
        report.write(f"start {number}\n".encode())
        report.write(f"{_outcome(target, data, number, batch.cpu_seconds)}\n".encode())
        for stream in (sys.stdout, sys.stderr):
            stream.seek(0)
            stream.truncate()


def _outcome(target: Target, data: bytes, number: int, cpu_seconds: float) -> str:
    # Without a handler the system ends the process, in the middle of a regular expression too.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS_MAX)
    try:
        target.run(data)
        return f"ended {number}"
    except EvalqError:
        return f"refused {number}"
    except MemoryError as error:
        return f"finding {number} {_described('over memory', error)}"
    except BaseException as error:  # SystemExit too: a reader does not end the process
        return f"finding {number} {_described('traceback', error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _described(kind: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if "site-packages" not in frame.filename and "/evalq/" in frame.filename
    ]
    last = (ours or frames)[-1]
    path = last.filename.rpartition("/evalq/")[2]
    text = "".join(traceback.format_exception(error, limit=-12))
    where = f"{type(error).__name__} at {path}:{last.lineno}"
    return json.dumps({"kind": kind, "where": where, "text": text[-4000:]})


def _limit_memory() -> None:
    """1 GiB above what is mapped now: the interpreter and its libraries are not the input's doing."""
    pages = Path("/proc/self/statm")
    mapped = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    limit = mapped + MEMORY_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(Batch(**json.loads(sys.argv[1])))
