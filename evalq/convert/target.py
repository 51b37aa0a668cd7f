"""A directory that is there when it is complete, and not before.

Everything is written into TARGET.partial-XXXX beside it, synced, and renamed at the end. A run that is killed
leaves that directory and TARGET.partial-XXXX.lock; no process holds the lock then, so the next run to TARGET
removes both, and never those of a run that is still going.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from evalq.errors import SpecError, StoreError


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Hand out a directory to write into; it becomes `target` if the block ends without an error.

    Args:
        target: must not exist; its parent is made.

    Raises:
        SpecError: it exists.
        StoreError: the disk says no.
    """
    require_new(target)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with _partial(target) as partial:
            yield partial
            _sync(partial)
            require_new(target)
            partial.rename(target)
            _sync_one(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write {error.filename or target}: {error.strerror or error}") from None


def require_new(target: Path) -> None:
    """Raise SpecError if there is anything at `target`."""
    if os.path.lexists(target):
        raise SpecError(f"{target} exists already", "name a directory that does not, or remove this one")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """The directory, locked; it and its lock are gone afterwards, whatever happens."""
    # The lock is made first, so that there is no directory without one.
    descriptor, name = tempfile.mkstemp(".lock", f"{target.name}.partial-", target.parent)
    os.close(descriptor)
    partial = Path(name).with_suffix("")
    try:
        with FileLock(name):
            partial.mkdir()
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(name).unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Remove what killed runs left behind."""
    for file in target.parent.glob(f"{_escaped(target.name)}.partial-*.lock"):
        try:
            with FileLock(file, timeout=0):
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink(missing_ok=True)
        except Timeout:
            continue


def _escaped(name: str) -> str:
    """A name with nothing in it that a glob would take as a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync(directory: Path) -> None:
    """Everything in a directory reaches the disk before the directory gets its name."""
    for path in [*directory.rglob("*"), directory]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
