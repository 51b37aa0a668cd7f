"""Starts workers, listens to them, ends them. What a worker does: `evalq.run.worker`."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from evalq.engine.columns import DEFAULT_COLUMNS
from evalq.engine.failures import from_exit
from evalq.engine.interpreters import ask
from evalq.errors import DataError, ModelError, StoreError
from evalq.results.speed import SpeedSettings
from evalq.run.job import Job, other_evalq, to_line
from evalq.version import JOB_VERSION

Event = dict[str, Any]
LOG_TAIL_BYTES = 20_000
_LONGEST_WAIT = threading.TIMEOUT_MAX / 2


@dataclass(frozen=True)
class RunSettings:
    """How a comparison is carried out; nothing here changes a number.

    Args:
        offline: never use the network.
        timeout_seconds: give a model up after that long, None for never.
        clear_cache: score anew what is stored.
        try_anyway: start engines that are predicted to run out of memory too.
        reference: label of the model that the others are compared with; None for the rule.
        columns: names of the per-token columns wanted; the first one is required.
        kld: compare whole distributions with the reference's.
        noise_floor: score the reference once more with noise in its layers.
        reference_most_bytes: the most that the reference's rows of one text may take in the store.
        speed: how to time each model; None leaves that out.
    """

    offline: bool = False
    timeout_seconds: float | None = None
    clear_cache: bool = False
    try_anyway: bool = False
    reference: str | None = None
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    kld: bool = False
    noise_floor: bool = False
    reference_most_bytes: int = 50 * 10**9
    per_byte: bool = False
    speed: SpeedSettings | None = None


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is started.

    Args:
        python: interpreter, None for this one.
        timeout_seconds: ended after that long, None for never.
        offline: tells the hub's client to stay off the network.
        log: file for what the engine prints.
    """

    python: str | None
    timeout_seconds: float | None
    offline: bool
    log: Path


def run_worker(job: Job, settings: WorkerSettings, on_event: Callable[[Event], None]) -> None:
    """Run one job to its end, passing its events on.

    Raises:
        ModelError: the job failed, crashed, was killed or took too long; or the interpreter's evalq reads
            other messages.
        DataError: the text or its protocol is at fault, not the model.
        StoreError: the store is.
        KeyboardInterrupt: passed on after the worker was ended.
    """
    interpreter = ask(settings.python)
    if interpreter.job_version != JOB_VERSION:
        what = f"reads messages of version {interpreter.job_version or 0}, this one writes {JOB_VERSION}"
        raise other_evalq(interpreter.path, what, interpreter.evalq)
    # A name of its own: another process may be writing the log of the same result.
    own = settings.log.with_name(f"{settings.log.stem}.{os.getpid()}{settings.log.suffix}")
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        log = own.open("w+b")
    except OSError as error:
        message = f"cannot write {own}: {error.strerror}"
        raise StoreError(message, "name another folder with --store") from None
    with log:
        process = _start(job, settings, log)
        try:
            outcome = _listen(process, settings.timeout_seconds, on_event)
        finally:
            _end(process)
            with contextlib.suppress(OSError):  # removed with the result by another process
                if _printed_nothing(own):
                    own.unlink()
                else:
                    os.replace(own, settings.log)
        if outcome.event is None:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            tail = log.read().decode(errors="replace")
            raise from_exit(process.returncode, outcome.stage, tail)
    _raise_for(outcome.event)


def _printed_nothing(log: Path) -> bool:
    """Whether a worker printed nothing, as one that found everything done by another process."""
    return log.stat().st_size == 0 and log.with_name(log.name.split(".")[0] + log.suffix).exists()


@dataclass
class _Outcome:
    """The last word of a worker (None when it ended without one) and what it was doing."""

    event: Event | None
    stage: str


def _start(job: Job, settings: WorkerSettings, log: IO[bytes]) -> subprocess.Popen[str]:
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if settings.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    process = subprocess.Popen(
        # -P: a file named like an engine in the current folder must not shadow it.
        [settings.python or sys.executable, "-P", "-m", "evalq.run.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C reaches the parent only, which ends the worker in order
    )
    assert process.stdin is not None
    try:
        process.stdin.write(to_line(job))
        process.stdin.flush()  # kept open: its end tells the worker that the parent is gone
    except BrokenPipeError:
        pass  # the exit code and the log say why
    return process


def _listen(
    process: subprocess.Popen[str], timeout_seconds: float | None, on_event: Callable[[Event], None]
) -> _Outcome:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.put(line)
        except ValueError:
            return  # closed by _end(), when nobody listens any more
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    # Longer than the system can wait is the same as for ever.
    limit = None if timeout_seconds is None or timeout_seconds > _LONGEST_WAIT else timeout_seconds
    deadline = None if limit is None else time.monotonic() + limit
    outcome = _Outcome(None, "load")
    while True:
        try:
            line = lines.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            message = f"took longer than {timeout_seconds:g} s"
            outcome.event = {"event": "failed", "category": "timeout", "message": message, "remedy": None}
            return outcome
        if line is None:
            process.wait()
            return outcome
        event = _parsed(line)
        if event["event"] == "progress":
            outcome.stage = "forward"
        if event["event"] in ("done", "failed", "store_error", "data_error"):
            outcome.event = event
            return outcome
        on_event(event)


def _parsed(line: str) -> Event:
    try:
        event = json.loads(line)
        return event if isinstance(event, dict) and "event" in event else {"event": "noise"}
    except ValueError:
        return {"event": "noise"}


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of the worker behind: its own children too."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # it ends itself
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what the worker started and left behind in its session
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=5)
    process.stdout.close()


def _raise_for(event: Event) -> None:
    kind, message, remedy = event["event"], event.get("message", ""), event.get("remedy")
    if kind == "failed":
        raise ModelError(message, event["category"], remedy)
    if kind == "store_error":
        raise StoreError(message, remedy)
    if kind == "data_error":
        raise DataError(message, remedy)
