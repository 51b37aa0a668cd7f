"""Files that are whole or not there: written under another name, synced, renamed."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from evalq.errors import StoreError


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` at `path`, or what was there before. Raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp keeps others from reading it
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}", write_remedy(error)) from None


def _umask() -> int:
    """The process's; there is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """A JSON file of the store, None when it is missing or broken (it is then made again)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_remedy(error: OSError) -> str:
    """What to do about a file that could not be written."""
    if error.errno in (28, 122, 27):  # ENOSPC, EDQUOT, EFBIG
        return "free some space and run again: what is stored stays, and the run continues from there"
    return "name a folder that can be written with --store"
