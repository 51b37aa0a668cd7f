"""`evalq results`: what the store holds."""

import argparse
from typing import TYPE_CHECKING

from evalq.cli.compare import add_store

if TYPE_CHECKING:
    from evalq.results.record import ResultRecord
    from evalq.results.store import ResultDir

DESCRIPTION = """\
What the store holds: one table for each group of results that can be compared, then those that are
unfinished or failed. Nothing is scored."""

EXAMPLES = """\
examples:
  evalq results                                 the user's own store
  evalq results --store /data/evalq             another one
  evalq results --json | jq '.[].ppl'           the records, for a script"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_store(parser)
    parser.add_argument("--json", action="store_true", help="the records as a list")


def run(arguments: argparse.Namespace) -> int:
    """What the store holds: one table per group of comparable results, then unfinished and failed ones."""
    import json
    import sys

    from rich.table import Table

    from evalq.files import read_json
    from evalq.results.store import Store, default_root
    from evalq.run.outcome import with_reference
    from evalq.show import table
    from evalq.show.console import output

    store = Store(arguments.store or default_root())
    groups: dict[str, list[ResultRecord]] = {}
    others = Table(
        "model", "state", "key", title="unfinished or failed", title_justify="left", title_style="dim"
    )
    for result in store.results():
        record = _stored_record(result)
        if record is not None:
            groups.setdefault(json.dumps(record.comparison, sort_keys=True), []).append(record)
            continue
        identity, failure = (
            read_json(result.path / "identity.json") or {},
            read_json(result.path / "failure.json"),
        )
        done = len(set(result.parts().window.tolist()))
        state = f"{done}/{identity.get('windows', '?')} windows"
        if failure:
            state += f", {failure['category']}: {failure['message']}"
        others.add_row(str(identity.get("label", "?")), state, result.path.name[:12])
    compared = [with_reference(group, [], store) for group in groups.values()]
    if arguments.json:
        sys.stdout.write(table.as_json([record for group in compared for record in group]))
        return 0
    console = output()
    for group in compared:
        table.print_table(group, console)
        console.print()
    if others.row_count:
        console.print(others)
    if not groups and not others.row_count:
        console.print(f"{store.root} holds no results yet", markup=False)
    return 0


def _stored_record(result: "ResultDir") -> "ResultRecord | None":
    """The record of a finished run; None when there is none, or another version of evalq wrote it."""
    from pydantic import ValidationError

    from evalq.files import read_json
    from evalq.results.record import ResultRecord

    try:
        return ResultRecord.model_validate(read_json(result.path / "record.json"))
    except ValidationError:
        return None
