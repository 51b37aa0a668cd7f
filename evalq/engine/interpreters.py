"""Which Python runs an engine, and what is installed for it.

Engines pin conflicting versions of torch, so an engine may have an interpreter of its own. It is asked the
way a worker is started: with the same environment variables (PYTHONPATH, environment modules, user site
packages count) and without the current folder (`-P`). What it prints beside the answer is ignored.
"""

import contextlib
import importlib.metadata
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from evalq.engine.registry import backend
from evalq.errors import ModelError
from evalq.version import JOB_VERSION, __version__

TIMEOUT_SECONDS = 60.0
_MOST_OUTPUT_BYTES = 2**20
_MARK = b"evalq-interpreter:"
_HUNG = f"gave no answer within {TIMEOUT_SECONDS:g} s"
# What another interpreter runs; it may hold any version of evalq, or none.
_QUESTION = """
import importlib.metadata, json, sys
packages = {}
for found in importlib.metadata.distributions():
    try:
        packages.setdefault(str(found.metadata["Name"]), str(found.version))
    except Exception:
        pass
answer = {"python": sys.version.split()[0], "packages": packages, "evalq": None, "job_version": None}
answer["folders"] = sys.path
try:
    from evalq.version import __version__
    answer["evalq"] = __version__
    from evalq.version import JOB_VERSION
    answer["job_version"] = JOB_VERSION
except Exception:
    pass
sys.stdout.flush()
sys.stdout.write("\\n%s %s\\n" % (sys.argv[1], json.dumps(answer)))
sys.stdout.flush()
"""


@dataclass(frozen=True)
class Interpreter:
    """What an interpreter answered.

    Args:
        path: as it was named; `sys.executable` for this one.
        python: its version, "3.12.3".
        evalq: the version of evalq that it imports.
        job_version: of the messages that evalq's worker reads; None where it has no number.
        packages: installed distributions, name in normal form (PEP 503) -> version.
        folders: that it imports from, in their order.
    """

    path: str
    python: str
    evalq: str
    job_version: int | None
    packages: Mapping[str, str]
    folders: tuple[str, ...] = ()

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution, None where it is not there."""
        return self.packages.get(_normal(distribution))


def versions(name: str, python: str | None = None) -> dict[str, str]:
    """Installed versions of a backend's distributions, the engine's own first; {} without the engine.

    Args:
        name: canonical backend name.
        python: another interpreter; None for this one.

    Raises:
        ModelError: category engine_missing, when that interpreter cannot be run or holds no evalq.
    """
    engine, *others = (dist.split("|") for dist in backend(name).distributions)
    interpreter = ask(python)
    wanted = [*engine, *(dist for other in others for dist in other)]
    found = {dist: v for dist in wanted if (v := interpreter.version(dist)) is not None}
    return found if any(dist in found for dist in engine) else {}


def ask(python: str | None) -> Interpreter:
    """What is installed for an interpreter; each is asked once.

    Args:
        python: path of another interpreter; None for this one.

    Raises:
        ModelError: category engine_missing, when it cannot be run or holds no evalq.
    """
    if python is None or Path(python) == Path(sys.executable):
        return _here()
    answer = _asked(python)
    if isinstance(answer, ModelError):
        raise answer
    return answer


@cache
def _here() -> Interpreter:
    packages = _first_of_each((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return Interpreter(
        sys.executable, sys.version.split()[0], __version__, JOB_VERSION, packages, tuple(sys.path)
    )


@cache
def _asked(python: str) -> Interpreter | ModelError:
    """The answer, or the error as a value, so that a hanging interpreter is waited for once."""
    try:
        return _read_answer(python, _run(python))
    except ModelError as error:
        return error


@dataclass(frozen=True)
class _Output:
    """What an interpreter printed.

    Args:
        answer: the answer's JSON, None without one.
        last_line: of everything else.
        ended: how it went on without an answer, "ended with code 1".
    """

    answer: bytes | None
    last_line: str
    ended: str


def _run(python: str) -> _Output:
    try:
        process = subprocess.Popen(
            [python, "-P", "-c", _QUESTION, _MARK.decode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"cannot run the interpreter {python}: {reason}", "engine_missing") from None
    assert process.stdout is not None
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        answer, last_line, ended = _listen(process.stdout, deadline)
        if answer is None and not ended:
            code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            ended = f"ended with code {code}"
    except subprocess.TimeoutExpired:
        ended = _HUNG
    finally:
        # Also what it started: a child that keeps the pipe open, an exit that hangs.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return _Output(answer, last_line, ended)


def _listen(stream: IO[bytes], deadline: float) -> tuple[bytes | None, str, str]:
    """The answer or None, the last other line, and why it was given up ("" where the stream ended)."""
    chunks: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(OSError), stream:
            while chunk := os.read(stream.fileno(), 65536):
                chunks.put(chunk)
        chunks.put(b"")

    threading.Thread(target=read, daemon=True).start()
    line, last, total = bytearray(), b"", 0
    while time.monotonic() < deadline:
        try:
            chunk = chunks.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        total += len(chunk)
        line += chunk or b"\n"
        if b"\n" in (chunk or b"\n"):
            *whole, rest = line.split(b"\n")
            for text in whole:
                if text.startswith(_MARK):
                    return bytes(text[len(_MARK) :]), _shown(last), ""
                last = bytes(text) if text.strip() else last
            line = bytearray(rest)
        if not chunk:
            return None, _shown(last), ""
        if total > _MOST_OUTPUT_BYTES:
            return None, _shown(last or bytes(line)), "printed more than 1 MiB"
    return None, _shown(last or bytes(line)), _HUNG


def _shown(line: bytes) -> str:
    """The start of a line, without control characters."""
    text = line[:400].decode(errors="replace")
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()[:200]


def _read_answer(python: str, output: _Output) -> Interpreter:
    """Raises ModelError (engine_missing) for an interpreter that gave no answer, or has no evalq."""
    try:
        raw: dict[str, Any] = json.loads(output.answer or b"null") or {}
        packages = _first_of_each(raw["packages"].items())
        folders = tuple(folder for folder in raw.get("folders", ()) if isinstance(folder, str))
        evalq, job, version = raw["evalq"], raw["job_version"], raw["python"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_answer(python, output) from None
    if not isinstance(evalq, str):
        message = f"evalq is not installed for {python}"
        remedy = f"{shlex.quote(python)} -m pip install evalq"
        raise ModelError(message, "engine_missing", remedy)
    job = job if isinstance(job, int) else None
    return Interpreter(python, str(version), evalq, job, packages, folders)


def _no_answer(python: str, output: _Output) -> ModelError:
    if "nknown option: -P" in output.last_line or "nknown option -P" in output.last_line:
        message = f"the interpreter {python} is older than Python 3.11"
        return ModelError(message, "engine_missing", "name a newer one that has evalq and the engine")
    last = f", its last line: {output.last_line}" if output.last_line else ""
    message = f"the interpreter {python} {output.ended or 'gave a broken answer'}{last}"
    remedy = f"it should be a Python: {shlex.quote(python)} --version"
    return ModelError(message, "engine_missing", remedy)


def _first_of_each(pairs: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    """Name in normal form -> version; the first one on the path is the one that is imported."""
    packages: dict[str, str] = {}
    for name, version in pairs:
        if isinstance(name, str) and isinstance(version, str):
            packages.setdefault(_normal(name), version)
    return packages


def _normal(distribution: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
