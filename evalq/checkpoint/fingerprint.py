"""What a model's files contain, in one digest: a replaced file makes another model.

digest = SHA-256 over the sorted (name, size, content digest) of the files; names are relative to the
directory that holds them all, so a moved or renamed directory keeps its digest.

Content digest: SHA-256 of the whole file up to 1 GiB. Above that, of its first 16 MiB (headers and the
first tensors), 256 evenly spaced blocks of 64 KiB, the last 64 KiB and its size: reading 100 GB to score a
few minutes would be out of proportion, and checkpoints with other weights differ nearly everywhere.

Digests are cached by (real path, size, mtime, ctime, inode). Whoever replaces a file can restore its mtime,
but not its ctime, which the kernel sets.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evalq.errors import ModelError, StoreError
from evalq.files import write_atomic

WHOLE_BYTES_MAX = 2**30
_HEAD_BYTES = 16 * 2**20
_BLOCK_BYTES = 64 * 2**10
_BLOCKS = 256
_READ_BYTES = 2**20
_LOCK_SECONDS = 10.0
_CACHE_BYTES_MAX = 64 * 2**20
# File times come from a clock that ticks every few milliseconds, so a file that changed just before it was
# read may change again without a new time. Such a file's digest is not remembered (git's "racy" problem).
_SETTLED_NS = 100_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a set of files.

    Args:
        digest: hexadecimal SHA-256.
        files: (name, bytes) of every file, sorted by name.
        contents: digest of each file's content, in the same order.
    """

    digest: str
    files: tuple[tuple[str, int], ...]
    contents: tuple[str, ...] = ()


@dataclass(frozen=True)
class _State:
    """What the file system knows of a file; another state may mean another content."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, result: os.stat_result) -> "_State":
        return cls(result.st_size, result.st_mtime_ns, result.st_ctime_ns, result.st_ino)

    def as_list(self) -> list[int]:
        return [self.bytes, self.mtime_ns, self.ctime_ns, self.inode]


def fingerprint(files: Sequence[Path], cache: Path | None) -> Fingerprint:
    """Digest a model's files.

    Args:
        files: in any order; at least one, no two of one name.
        cache: a JSON file that remembers content digests; created when missing, ignored when broken or not
            writable. None hashes everything.

    Raises:
        ModelError: model_missing if a file is not there, model_corrupt if it cannot be read or changes
            while it is read.
    """
    root = Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))
    known = _read_cache(cache) if cache is not None else {}
    fresh: dict[str, list[Any]] = {}
    entries = []
    for file in files:
        name = Path(os.path.abspath(file)).relative_to(root).as_posix()
        real = os.path.realpath(file)
        state, digest = _content_digest(Path(real), known.get(real))
        if known.get(real) != [*state.as_list(), digest] and _settled(state):
            fresh[real] = [*state.as_list(), digest]
        entries.append((name, state.bytes, digest))
    entries.sort()
    if cache is not None and fresh:
        _write_cache(cache, fresh)
    whole = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return Fingerprint(
        whole, tuple((name, size) for name, size, _ in entries), tuple(content for _, _, content in entries)
    )


def _content_digest(file: Path, remembered: list[Any] | None) -> tuple[_State, str]:
    """State and content digest of one file, from the cache if the state is the remembered one."""
    try:
        with file.open("rb") as stream:
            state = _State.of(os.fstat(stream.fileno()))
            if remembered is not None and remembered[:4] == state.as_list():
                return state, str(remembered[4])
            digest = hashlib.sha256()
            for offset, length in _extents(state.bytes):
                stream.seek(offset)
                while length and (data := stream.read(min(length, _READ_BYTES))):
                    digest.update(data)
                    length -= len(data)
            changed = _State.of(os.fstat(stream.fileno())) != state
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file", "model_missing") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}", "model_corrupt") from None
    if changed:
        raise ModelError(
            f"{file}: changed while it was read", "model_corrupt", "wait until it is complete and run again"
        )
    if state.bytes > WHOLE_BYTES_MAX:
        digest.update(str(state.bytes).encode())
    return state, digest.hexdigest()


def _extents(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is hashed of a file of `size` bytes."""
    if size <= WHOLE_BYTES_MAX:
        yield 0, size
        return
    yield 0, _HEAD_BYTES
    last = size - _BLOCK_BYTES
    for i in range(_BLOCKS):
        yield _HEAD_BYTES + (last - _HEAD_BYTES) * i // _BLOCKS, _BLOCK_BYTES
    yield last, _BLOCK_BYTES


def _settled(state: _State) -> bool:
    """Whether the next change of the file will surely show in its times."""
    return time.time_ns() - max(state.ctime_ns, state.mtime_ns) > _SETTLED_NS


def _read_cache(cache: Path) -> dict[str, list[Any]]:
    """Remembered [bytes, mtime_ns, ctime_ns, inode, digest] by real path; {} for a broken file."""
    try:
        if cache.stat().st_size > _CACHE_BYTES_MAX:
            return {}
        entries = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {path: entry for path, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """Whether a value of the cache is one of ours."""
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(n) is int for n in entry[:4])
        and isinstance(entry[4], str)
        and _SHA256.fullmatch(entry[4]) is not None
    )


def _write_cache(cache: Path, fresh: dict[str, list[Any]]) -> None:
    """Add digests to the cache. A cache that cannot be written costs time, never a result."""
    with contextlib.suppress(OSError, Timeout, StoreError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock", timeout=_LOCK_SECONDS):
            text = json.dumps({**_read_cache(cache), **fresh}, indent=0)
            write_atomic(cache, text.encode())
