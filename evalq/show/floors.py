"""The floors of a run in words: below them a KL divergence says nothing."""

from collections.abc import Sequence

from evalq.results.floor import EngineFloor, at_floor, floors
from evalq.results.record import ResultRecord
from evalq.show.numbers import digits_for, estimate

MARK = "<floor"
_KLD_DIGITS = 5


def floor_lines(records: Sequence[ResultRecord]) -> list[str]:
    """What is known of each engine's floor, a line each; none without a KLD."""
    found = floors(records)
    if not found:
        return []
    against = next((r.against_reference for r in records if r.against_reference), None)
    if against is not None and against.quantized and all(one.floor is None for one in found):
        names = ", ".join(dict.fromkeys(one.engine for one in found))
        return [f"floor of {names} is unknown: the reference, {against.label}, is itself quantized"]
    reference = "the reference" if against is None else against.label
    lines = [_line(one, reference) for one in found]
    if any(at_floor(record, records) for record in records):
        lines.append(f"{MARK}: at or below the floor of its engine, so this KLD says nothing")
    return lines


def mark(record: ResultRecord, records: Sequence[ResultRecord]) -> str:
    """What stands behind a KLD at or below its engine's floor, else nothing."""
    return f" {MARK}" if at_floor(record, records) else ""


def _line(found: EngineFloor, reference: str) -> str:
    floor = found.floor
    if floor is None:
        why = "no unquantized model ran in it"
        if found.is_references:
            why = "it is the reference's own engine; --noise-floor measures it where the engine can (hf)"
        return f"floor of {found.engine} is unknown: {why}"
    value = estimate(floor.kld.value, floor.kld.stderr, digits_for(floor.kld.value, _KLD_DIGITS))
    how = f"{floor.label} against {reference}"
    if floor.kind == "noise":
        how = f"{reference} with every layer's output times (1 + 2^-9 normal)"
    return f"floor of {found.engine}: KLD {value}, {how}: values at or below it say nothing"
