"""Data sets of the hub, read with Hugging Face's `datasets`, and kept once they were fetched.

They are streamed: only the rows that are wanted are fetched, and nothing is written but the store's own copy.
No code of a data set runs: `datasets` reads files only, and is not asked to trust any.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalq.checkpoint.hub_access import hub_answers, hub_name
from evalq.data.tables import Column, column_of
from evalq.errors import DataError
from evalq.files import read_json, write_json
from evalq.spec.base import shown
from evalq.spec.texts import HubSet

_MESSAGE_CHARACTERS = 240
_ONCE = 'run once with a network: it is kept then; or score a local copy, dataset "text" with its "path"'


@dataclass(frozen=True)
class Fetched:
    """A column, and the commit it was read at; None where that is not known."""

    column: Column
    commit: str | None

    def origin(self, asked: HubSet) -> dict[str, Any]:
        """Where it came from, for the record."""
        known = {"hub": asked.name} | {k: v for k, v in asdict(asked).items() if k != "name"}
        return {k: v for k, v in (known | {"commit": self.commit}).items() if v is not None}


def fetch(asked: HubSet, kept: Path, offline: bool) -> Fetched:
    """A column of a data set, from the store where it was fetched before.

    Args:
        asked: which.
        kept: folder of the texts that were fetched.
        offline: never use the network.

    Raises:
        DataError: there is no such data set, split or column, or no network to fetch it.
    """
    file = kept / f"hub-{_key(asked)}.json"
    stored = None if _is_folder(asked) else _stored(file, asked)
    if stored is not None:
        return stored
    found = read(asked, offline)
    if not _is_folder(asked):
        with contextlib.suppress(
            TypeError
        ):  # values that JSON does not have are no text, which is said later
            values = list(found.column.values)
            write_json(file, {"asked": asdict(asked), "commit": found.commit, "values": values})
    return found


def read(asked: HubSet, offline: bool) -> Fetched:
    """A column of a data set from the hub, or from a folder laid out like one. Raises as `fetch`."""
    if _is_folder(asked):
        return Fetched(column_of(_rows(asked, None), asked.column, asked.rows, asked.name), None)
    if hub_name(asked.name) is None:
        raise DataError(
            f'"{shown(asked.name)}" is no folder, and no name of a data set on the hub', 'write "owner/name"'
        )
    if offline:
        raise DataError(f"{asked.name} was not fetched from the hub yet", _ONCE)
    commit = _commit(asked) if hub_answers() else None
    return Fetched(column_of(_rows(asked, commit), asked.column, asked.rows, asked.name), commit)


def _is_folder(asked: HubSet) -> bool:
    """Whether a name is a path, which the data spec made absolute."""
    return Path(asked.name).is_absolute()


def _key(asked: HubSet) -> str:
    return hashlib.sha256(json.dumps(asdict(asked), sort_keys=True).encode()).hexdigest()[:32]


def _stored(file: Path, asked: HubSet) -> Fetched | None:
    """What was fetched before; None where it is not there or is not what was asked for."""
    kept = read_json(file)
    if not isinstance(kept, dict) or kept.get("asked") != asdict(asked) or not kept.get("values"):
        return None
    values, commit = kept["values"], kept.get("commit")
    places = tuple(f"{asked.name} row {number}" for number in range(1, len(values) + 1))
    return Fetched(Column(tuple(values), places, asked.column), commit if isinstance(commit, str) else None)


def _commit(asked: HubSet) -> str | None:
    """The commit that the revision stands for now. Raises DataError."""
    from huggingface_hub import HfApi, errors

    try:
        commit: str | None = HfApi().dataset_info(asked.name, revision=asked.revision).sha
    except errors.GatedRepoError:
        remedy = f"accept its terms on https://huggingface.co/datasets/{asked.name}, then: hf auth login"
        raise DataError(f"the data set {asked.name} is gated", remedy) from None
    except errors.RevisionNotFoundError:
        raise DataError(
            f'the data set {asked.name} has no revision "{asked.revision}"', 'correct "revision"'
        ) from None
    except errors.RepositoryNotFoundError:
        remedy = 'correct "name"; for a private one: hf auth login'
        raise DataError(f"there is no public data set {asked.name} on huggingface.co", remedy) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise _unreachable(asked, error) from None
    return commit


def _rows(asked: HubSet, commit: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of the split, one by one; without a network those that `datasets` keeps itself.

    Args:
        asked: which.
        commit: to read; None without a network, and for a folder.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"reading {asked.name} needs datasets", 'pip install "evalq[data]"') from None
    files = {} if asked.data_file is None else {"data_files": {asked.split: asked.data_file}}
    streaming = commit is not None or _is_folder(asked)
    revision = commit or asked.revision
    try:
        found = load_dataset(
            asked.name, asked.config, split=asked.split, revision=revision, streaming=streaming, **files
        )
        for number, row in enumerate(found, 1):
            yield f"{asked.name} row {number}", row
    except Exception as error:  # whatever a builder of `datasets` and the libraries under it raise
        raise _unreachable(asked, error) from None


def _unreachable(asked: HubSet, error: Exception) -> DataError:
    """One line of what `datasets` said, and what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= _MESSAGE_CHARACTERS else f"{said[:_MESSAGE_CHARACTERS]}..."
    if isinstance(error, ValueError):  # another config or split: it lists those there are
        return DataError(f"the data set {asked.name}: {said}", 'correct "config" or "split" in the data spec')
    return DataError(f"{asked.name} cannot be read: {said}", 'correct "name"' if _is_folder(asked) else _ONCE)
