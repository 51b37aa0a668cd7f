"""What other results already hold of a plan's windows: results of evalq 0.1, and of more or fewer windows.

A window's scores depend on its own tokens only, so a window that another result of the same model on the same
tokens holds is not scored again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evalq.data.windows import WindowPlan
from evalq.errors import StoreError
from evalq.files import read_json, write_atomic, write_json
from evalq.results.store import RUN, SCORES, ResultDir, Store, family_of, key_of
from evalq.results.tokens import Part, TokenColumns, encode


def reuse(
    store: Store, result: ResultDir, plan: WindowPlan, identity: Mapping[str, Any], legacy: Mapping[str, Any]
) -> None:
    """Fill a result with what the store already holds of its windows.

    Args:
        store: all results.
        result: to be filled; left alone where another process is writing it.
        plan: its windows.
        identity: of the result.
        legacy: the identity that evalq 0.1 would have given it.
    """
    try:
        with result.lock(timeout=0):
            if result.scores() is not None:
                return
            if _adopt(store.result(key_of(legacy)), result, plan):
                return
            for other in store.family(family_of(identity)):
                if other.path != result.path:
                    _take(other, result, plan)
    except StoreError:
        return  # it is scored instead, where the store's trouble is told


def _adopt(old: ResultDir, result: ResultDir, plan: WindowPlan) -> bool:
    """Take over a finished result of evalq 0.1. Its key did not hold the digest of its windows."""
    found = old.scores()
    if found is None or found.plan is not None or not found.belongs_to(plan):
        return False
    run = old.run() | {"environment": read_json(old.path / "environment.json")}
    write_json(result.path / RUN, run)
    taken = TokenColumns(found.columns, found.window_of, found.timing, plan.table, plan.digest)
    write_atomic(result.path / SCORES, encode(taken))
    return True


def _take(other: ResultDir, result: ResultDir, plan: WindowPlan) -> None:
    """Copy the windows that a finished result shares with this plan, as parts."""
    found = other.every_target()
    if found is None or found.windows is None:
        return
    theirs = {tuple(row): index for index, row in enumerate(found.windows.tolist())}
    held = result.held(plan)
    missing = held.missing(found.columns)
    shared = {
        index: theirs[row] for index, row in enumerate(map(tuple, plan.table.tolist())) if row in theirs
    }
    by_size: dict[int, list[int]] = {}
    for index in missing:
        if index in shared:
            by_size.setdefault(plan.windows[index].n_targets, []).append(index)
    starts = np.searchsorted(found.window_of, np.arange(len(found.windows)))
    for size, indices in by_size.items():
        rows = np.stack([np.arange(size) + starts[shared[index]] for index in indices])
        columns = {name: column[rows] for name, column in found.columns.items()}
        part = Part(tuple(indices), columns, found.timing.scaled(rows.size))
        result.write_part(part, plan)
    if by_size and not result.held(plan).missing(found.columns):
        result.finish(result.held(plan), other.run())
