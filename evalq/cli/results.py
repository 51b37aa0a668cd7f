"""`evalq results`: what the store holds."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalq.cli.compare import add_store

if TYPE_CHECKING:
    from rich.console import Console

    from evalq.results.record import ResultRecord
    from evalq.results.store import Store

DESCRIPTION = """\
What the store holds: one table for each group of results that can be compared, then those that are
unfinished, failed or damaged. It only reads: nothing is scored, made or mended."""

EXAMPLES = """\
examples:
  evalq results                                 the user's own store
  evalq results --store /data/evalq             another one, which may be read-only
  evalq results --json | jq '.[].ppl'           the records, for a script

exit code: 0, also where some result is damaged"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_store(parser)
    parser.add_argument("--json", action="store_true", help="the records as a list")


@dataclass(frozen=True)
class Unfinished:
    """A result without a record.

    Args:
        label: of the model, as in its spec.
        state: how far it came, and why it ended.
        key: its folder in the store.
    """

    label: str
    state: str
    key: str


def run(arguments: argparse.Namespace) -> int:
    """One table per group of comparable results, then unfinished, failed and damaged ones. Exit code 0."""
    import json
    import sys

    from evalq.results.store import Store, default_root
    from evalq.show import table
    from evalq.show.console import output, say

    root = arguments.store or default_root()
    console = output()
    if not root.is_dir():
        say(console, "[]" if arguments.json else f"{root} holds no results yet")
        return 0
    store = Store(root)
    groups: dict[str, list[ResultRecord]] = {}
    others = []
    for result in store.results():
        found = _stored(result.path)
        if isinstance(found, Unfinished):
            others.append(found)
        else:
            groups.setdefault(json.dumps(found.comparison, sort_keys=True), []).append(found)
    compared = [_compared(group, store) for group in groups.values()]
    if arguments.json:
        sys.stdout.write(table.as_json([record for group in compared for record in group]))
        return 0
    for group in compared:
        table.print_table(group, console)
        console.print()
    if others:
        _print_unfinished(others, console)
    if not groups and not others:
        say(console, f"{store.root} holds no results yet")
    return 0


def _stored(folder: Path) -> "ResultRecord | Unfinished":
    """What lies in the folder of a result. Files that cannot be read are said, never raised."""
    from pydantic import ValidationError

    from evalq.results.record import ResultRecord

    record = _json(folder / "record.json")
    try:
        return ResultRecord.model_validate(record)
    except (ValidationError, RecursionError):
        identity, failure = _json(folder / "identity.json"), _json(folder / "failure.json")
    label = str(identity.get("label", "?"))
    if record or (folder / "scores.safetensors").exists():
        state = "scored, but its record cannot be read: run the comparison again, which makes it anew"
    elif failure:
        state = f"{_progress(folder, identity)}, {failure.get('category')}: {failure.get('message')}"
    else:
        state = _progress(folder, identity)
    return Unfinished(label, state, folder.name)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    import json

    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _progress(folder: Path, identity: dict[str, Any]) -> str:
    """How many windows are there."""
    from safetensors import SafetensorError, safe_open

    done: set[int] = set()
    for file in sorted((folder / "parts").glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as part:
                done |= {int(window) for window in part.get_tensor("window").ravel()}
        except (OSError, SafetensorError, ValueError, TypeError):
            continue
    return f"{len(done)}/{identity.get('windows', '?')} windows"


def _compared(group: "list[ResultRecord]", store: "Store") -> "list[ResultRecord]":
    """The group with each model beside the reference; as it is where the scores do not allow that."""
    from evalq.errors import EvalqError
    from evalq.run.outcome import with_reference

    try:
        return with_reference(group, [], store)
    except EvalqError:
        return group


def _print_unfinished(others: list[Unfinished], console: "Console") -> None:
    from evalq.show.columns import MINOR, Column, print_columns
    from evalq.show.console import say

    say(console, ("unfinished, failed or damaged", "dim"))
    console.print()
    print_columns(
        others,
        [
            Column[Unfinished]("model", lambda one: one.label),
            Column[Unfinished]("state", lambda one: one.state, folds=True),
            Column[Unfinished]("key", lambda one: one.key[:12], MINOR),
        ],
        console,
    )
