"""The errors that reading model files can end in, one constructor per category.

Model files come from strangers, so every message names the file and what is wrong with it; none shows
more of the file's content than one name.
"""

import json
import shlex
from pathlib import Path

from evalq.errors import ModelError

_CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; w = {{}}; "
    '[w.update(torch.load(f, map_location="cpu", weights_only=True)) for f in sorted(glob.glob({pattern}))]; '
    "save_file({{k: v.clone().contiguous() for k, v in w.items()}}, {result}, "
    'metadata={{"format": "pt"}})'
)


class DamagedFile(ModelError):
    """A file that is not what it claims to be: model_corrupt.

    Args:
        path: the file.
        what: is wrong with it.
        finding: the name of a finding about it.
    """

    def __init__(self, path: Path, what: str, finding: str) -> None:
        """Keep the name and the file beside the line."""
        super().__init__(f"{path}: {what}", "model_corrupt")
        self.path, self.finding = path, finding


def corrupt(path: Path, what: str, finding: str = "damaged-file") -> DamagedFile:
    """A file that is not what it claims to be."""
    return DamagedFile(path, what, finding)


def missing(path: Path, what: str, remedy: str | None = None) -> ModelError:
    """No model where one was expected."""
    return ModelError(f"{path}: {what}", "model_missing", remedy)


def pickled(path: Path, directory: Path, pattern: str, result: str = "model.safetensors") -> ModelError:
    """Only a pickle, which may run code when it is opened; the remedy is a command that does not let it.

    Args:
        path: the file.
        directory: it lies in.
        pattern: what all files of the model match there.
        result: name of the file that the command writes.
    """
    # Names come from strangers: quoted for Python (a JSON string is one), then for the shell.
    code = _CONVERT.format(pattern=json.dumps(pattern), result=json.dumps(result))
    command = f"cd {shlex.quote(str(directory))} && python -c {shlex.quote(code)}"
    return ModelError(
        f"{path}: weights in a pickle file, and no safetensors beside it",
        "unsafe_checkpoint",
        f"run: {command}, or use https://huggingface.co/spaces/safetensors/convert",
    )


def clipped(text: str, limit: int = 120) -> str:
    """A name out of a file, printable and short enough for one line."""
    shown = text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
