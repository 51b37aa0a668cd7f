"""What both kinds of spec share: strict objects, and paths relative to the file they were read from."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A JSON object whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def resolve_path(name: str, base: Path) -> Path:
    """`~` and `$VARS` expanded, relative to `base`."""
    return base / Path(os.path.expandvars(name)).expanduser()
