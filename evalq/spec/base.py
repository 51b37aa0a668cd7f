"""What both kinds of spec share: strict objects, and paths relative to the file they were read from."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, model_validator

from evalq.errors import SpecError

# Integers that every JSON reader keeps exact.
MOST = 2**53
_NAME_BYTES_MAX, _PATH_BYTES_MAX = 255, 4095


class Spec(BaseModel):
    """A JSON object whose keys are all known. A null stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        fields = cls.model_fields
        return {k: v for k, v in raw.items() if v is not None or k not in fields or fields[k].is_required()}


def resolve_path(name: str, base: Path) -> Path:
    """`~` and `$VARS` expanded, relative to `base`. Raises SpecError for what no file can be called.

    A file whose own name holds a `$` goes first.
    """
    try:
        if "$" in name and os.path.exists(base / name):
            return base / name
        path = base / Path(os.path.expandvars(name)).expanduser()
        _require_nameable(path)
    except (ValueError, RuntimeError) as error:
        raise SpecError(f"{shown(name)}: {error}") from None
    return path


def shown(text: str, most: int = 80) -> str:
    """A text from a file as one short printable line."""
    line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: most + 1])
    return line if len(line) <= most else f"{line[:most]}..."


def usable(name: str) -> str:
    """Raise ValueError for what no file can be called, at load instead of after other models were scored."""
    if not name.strip():
        raise ValueError("is empty")
    try:
        _require_nameable(Path(os.path.expandvars(name)).expanduser())
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return name


def _require_nameable(path: Path) -> None:
    try:
        sizes = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    if "\0" in str(path):
        raise ValueError("holds a NUL character")
    if max(sizes, default=0) > _NAME_BYTES_MAX:
        raise ValueError(f"a name in it is longer than {_NAME_BYTES_MAX} bytes")
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise ValueError(f"is longer than {_PATH_BYTES_MAX} bytes")


# A path or a hub name, as written in a spec.
PathText = Annotated[str, AfterValidator(usable)]
# The name of something that evalq knows.
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
