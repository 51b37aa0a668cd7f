"""Which model the others are compared with, and the comparison.

The reference is chosen before anything is scored: by hand (`--reference LABEL`, then `"reference": true`,
then compare_q's `out_logits`), else by rule: the unquantized model, of several the first with the most bits
per weight. A dequantized or merged checkpoint has the bits of an unquantized model and the errors of its
source, so by rule it comes last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evalq.data.windows import cluster_of, least_clusters
from evalq.errors import ModelError, SpecError
from evalq.results.by_position import pair_by_position
from evalq.results.paired import Pair, compare
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.store import family_of
from evalq.results.tokens import TokenColumns
from evalq.spec.files import nearest

UNQUANTIZED_BPW = 15.99


@dataclass(frozen=True)
class Candidate:
    """A model as the rule sees it.

    Args:
        label: its own.
        layer_bpw: bits per weight of its layers; None for a model that cannot be scored.
        derived: made out of another checkpoint (dequantized, merged), or with an adapter on top.
        marked: by its spec: 2 for "reference", 1 for "out_logits", 0 for neither.
    """

    label: str
    layer_bpw: float | None
    derived: bool = False
    marked: int = 0

    @property
    def unquantized(self) -> bool:
        """Whether it is what the others were made from, as far as its files tell."""
        return not self.derived and (self.layer_bpw or 0.0) >= UNQUANTIZED_BPW


@dataclass(frozen=True)
class Reference:
    """The model that the others are compared with.

    Args:
        label: its own.
        quantized: it is no unquantized original, which tables and charts say.
        by_hand: chosen by a person: if it fails, nothing takes its place.
    """

    label: str
    quantized: bool
    by_hand: bool


def choose(candidates: Sequence[Candidate], label: str | None = None) -> Reference | None:
    """The reference of a run; None where fewer than two models can be scored.

    Args:
        candidates: in the order of the specs.
        label: chosen on the command line, None for the rule.

    Raises:
        SpecError: no model has this label.
    """
    labels = [candidate.label for candidate in candidates]
    if label is not None and label not in labels:
        raise SpecError(f'--reference: no model has the label "{label}"', nearest(label, labels))
    able = [candidate for candidate in candidates if candidate.layer_bpw is not None]
    by_hand = [candidate for candidate in candidates if candidate.label == label] or [
        candidate
        for mark in (2, 1)
        for candidate in candidates
        if candidate.marked == mark and (mark == 2 or candidate.layer_bpw is not None)
    ]
    if by_hand:
        return Reference(by_hand[0].label, not by_hand[0].unquantized, True)
    if len(able) < 2:
        return None
    best = max(able, key=lambda found: (found.unquantized, not found.derived, found.layer_bpw or 0.0))
    return Reference(best.label, not best.unquantized, False)


def choose_stored(records: Sequence[ResultRecord]) -> Reference | None:
    """The reference among stored results: the one that was it last, else by rule."""
    scored = [record for record in records if record.status == "ok"]
    marked = [record for record in scored if record.is_reference]
    if marked:
        last = max(marked, key=lambda record: record.scored_at or "")
        return Reference(last.label, (last.layer_bpw or 0.0) < UNQUANTIZED_BPW, True)
    return choose([Candidate(r.label, r.layer_bpw, r.derived or r.lora is not None) for r in scored])


def with_reference(
    records: Sequence[ResultRecord],
    reference: Reference | None,
    scores_of: Callable[[ResultRecord], TokenColumns | None],
) -> list[ResultRecord]:
    """The same records, each scored one compared with the reference on the tokens both scored.

    Args:
        records: of one run.
        reference: chosen before it; where it failed, the records stay as they are.
        scores_of: a record's per-token columns, None where they are gone.
    """
    base = next((r for r in records if reference and r.label == reference.label and r.status == "ok"), None)
    columns = None if base is None else scores_of(base)
    family = None if base is None else family_of(base.identity)
    if reference is None or base is None or columns is None:
        return [record.model_copy(update={"is_reference": False}) for record in records]
    found = []
    for record in records:
        if record is base:
            found.append(record.model_copy(update={"is_reference": True, "against_reference": None}))
        elif record.status == "ok":
            mine = scores_of(record)
            beside = None if mine is None else mine.beside(family)
            found.append(_compared(record, base, reference, columns, beside))
        else:
            found.append(record)
    return found


def _compared(
    record: ResultRecord,
    base: ResultRecord,
    reference: Reference,
    theirs: TokenColumns,
    mine: TokenColumns | None,
) -> ResultRecord:
    cleared = record.model_copy(update={"is_reference": False, "against_reference": None})
    if mine is None:
        return cleared
    pair = paired(mine, theirs, record.protocol, record.ppl_stderr_is_lower_bound)
    try:
        metrics, notes = compare(pair), pair.notes()
        by_position = pair_by_position(pair, mine.windows, mine.targets)
    except ModelError as error:
        note = f'not compared with "{base.label}" token by token: {error.message}'
        return cleared.model_copy(update={"notes": list(dict.fromkeys([*record.notes, note]))})
    against = AgainstReference(
        label=base.label,
        key=base.key,
        quantized=reference.quantized,
        metrics=metrics,
        by_position=by_position,
    )
    kept = list(dict.fromkeys([*record.notes, *notes]))
    return cleared.model_copy(update={"against_reference": against, "notes": kept})


def paired(mine: TokenColumns, theirs: TokenColumns, protocol: str, overlapping: bool = False) -> Pair:
    """Two results on the same tokens.

    Args:
        mine: columns of the model; those beside the reference under their plain names.
        theirs: columns of the reference.
        protocol: of both.
        overlapping: what is known of windows that evalq 0.1 stored without saying where they lie.
    """
    overlap_ignored = overlapping and mine.windows is None
    return Pair(mine.columns, theirs.columns, clusters_of(mine, protocol), overlap_ignored)


def clusters_of(found: TokenColumns, protocol: str) -> NDArray[np.int64]:
    """Which tokens depend on each other, int64 [n]; the windows where it is not known where those lie."""
    if found.windows is None:
        return found.window_of
    return found.of_these(cluster_of(found.windows, least_clusters(protocol)))
