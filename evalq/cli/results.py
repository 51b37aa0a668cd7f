"""`evalq results`: what the store holds."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalq.cli.compare import add_store

if TYPE_CHECKING:
    from rich.console import Console

    from evalq.results.record import ResultRecord
    from evalq.results.store import ResultDir, Store

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
    parser.add_argument("--kld", action="store_true", help="KL divergence too, where it is stored")
    parser.add_argument("--positions", action="store_true", help="tables by position in the window too")


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
    import sys

    from evalq.results.store import Store, default_root
    from evalq.show import table
    from evalq.show.console import output, say
    from evalq.show.positions import print_positions

    root = arguments.store or default_root()
    console = output()
    if not root.is_dir():
        say(console, "[]" if arguments.json else f"{root} holds no results yet")
        return 0
    store = Store(root, read_only=True)
    groups: dict[str, list[ResultRecord]] = {}
    others = []
    for result in store.results():
        found = _stored(result)
        if isinstance(found, Unfinished):
            others.append(found)
        else:
            groups.setdefault(_measured(found), []).append(found)
    compared = [_compared(group, store) for group in groups.values()]
    if arguments.json:
        sys.stdout.write(table.as_json([record for group in compared for record in group]))
        return 0
    for group in compared:
        table.print_table(group, console, arguments.kld)
        if arguments.positions:
            print_positions(group, console, arguments.kld)
        console.print()
    if others:
        _print_unfinished(others, console)
    if not groups and not others:
        say(console, f"{store.root} holds no results yet")
    return 0


def _stored(result: "ResultDir") -> "ResultRecord | Unfinished":
    """What lies in the folder of a result. Files that cannot be read are said, never raised."""
    from evalq.results.record import read_record

    record = read_record(result.path)
    if record is not None:
        return record
    identity, failure = _json(result.path / "identity.json"), _json(result.path / "failure.json")
    label = str(identity.get("label", "?"))
    progress = f"{result.windows_done()}/{identity.get('windows', '?')} windows"
    if (result.path / "record.json").exists() or (result.path / "scores.safetensors").exists():
        state = "scored, but its record cannot be read: run the comparison again, which makes it anew"
    elif failure:
        state = f"{progress}, {failure.get('category')}: {failure.get('message')}"
    else:
        state = progress
    return Unfinished(label, state, result.path.name)


def _measured(record: "ResultRecord") -> str:
    """What records of one table share. evalq 0.1 did not keep the digest of the windows."""
    import json

    shared = {name: value for name, value in record.comparison.items() if name != "plan_sha256"}
    return json.dumps(shared, sort_keys=True)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    from evalq.files import read_json

    value = read_json(file)
    return value if isinstance(value, dict) else {}


def _compared(group: "list[ResultRecord]", store: "Store") -> "list[ResultRecord]":
    """The group with each model beside the reference; as it is where the scores do not allow that."""
    from evalq.errors import EvalqError
    from evalq.results.floor import with_floors
    from evalq.results.reference import choose_stored, with_reference

    try:
        reference = choose_stored(group)
        found = with_reference(group, reference, lambda record: store.result(str(record.key)).scores())
        return with_floors(found)
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
