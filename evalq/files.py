"""Files that are whole or not there: written under another name, synced, renamed."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from evalq.errors import StoreError

# Another process may remove the folder between making it and writing into it.
_TRIES = 3


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` at `path`, or what was there before. Raises StoreError."""
    for attempt in range(_TRIES):
        try:
            _write(path, data)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _TRIES - 1:
                continue
            message = f"cannot write {path}: {error.strerror or error}"
            raise StoreError(message, write_remedy(error)) from None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp keeps others from reading it
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The process's; there is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as from a file name that is no UTF-8
        data = (json.dumps(value, indent=2) + "\n").encode()
    write_atomic(path, data)


def read_json(path: Path) -> Any | None:
    """A JSON file of the store, None when it is missing or broken (it is then made again)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_remedy(error: OSError) -> str:
    """What to do about a file that could not be written."""
    if error.errno in (28, 122, 27):  # ENOSPC, EDQUOT, EFBIG
        return "free some space and run again: what is stored stays, and the run continues from there"
    return "name a folder that can be written with --store"
