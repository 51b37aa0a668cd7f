"""The KL divergence that an engine shows without any quantization: the null control.

An engine that computes the unquantized model in its own order of additions and its own data types is not
the reference, so its mean KLD against the reference is above zero. A quantized model in that engine cannot
be told from a perfect one below that value: it is the engine's floor. For the reference's own engine the
same model scored again is the very same, so there the floor is that of rounding: the reference with every
layer's output times (1 + 2**-9 normal), a result whose options hold `layer_noise`.

A dequantized or merged checkpoint and a model with an adapter on top have the bits of an unquantized model
and not its weights, so they make no floor. Nor does anything but noise where the reference is itself
quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evalq.engine.backend import LAYER_NOISE
from evalq.engine.columns import KLD
from evalq.results.estimate import Estimate
from evalq.results.record import Floor, ResultRecord
from evalq.results.reference import UNQUANTIZED_BPW


@dataclass(frozen=True)
class EngineFloor:
    """What is known of the floor of one engine.

    Args:
        engine: its name.
        floor: None where it is unknown.
        is_references: the reference itself was scored in it.
    """

    engine: str
    floor: Floor | None
    is_references: bool


def floors(records: Sequence[ResultRecord]) -> list[EngineFloor]:
    """The floors of a run: one for each engine that scored a quantized model beside the reference.

    An engine has several where its models ran with other numeric options, each with a null control.

    Args:
        records: of one run, compared with its reference.
    """
    own = {engine_of(record) for record in records if record.is_reference}
    found: dict[tuple[str, str | None], EngineFloor] = {}
    for record in records:
        if kld_of(record) is None or _makes_floor(record):
            continue
        engine, floor = engine_of(record), floor_of(record, records)
        name = (engine, None if floor is None else floor.label)
        found.setdefault(name, EngineFloor(engine, floor, engine in own))
    return list(found.values())


def floor_of(record: ResultRecord, records: Sequence[ResultRecord]) -> Floor | None:
    """The floor that a model's KLD is held against; None where it is unknown, or the model makes it.

    Of several null controls in the model's engine it is the one with the model's numeric options, else the
    smallest: what another option adds, such as a quantized KV cache, is not the engine's own. Where the
    reference was scored in this engine, rounding's floor goes before another unquantized model's.
    """
    if kld_of(record) is None or _makes_floor(record):
        return None
    engine, options = engine_of(record), _options(record)
    able = [other for other in records if _makes_floor(other) and engine_of(other) == engine]
    noisy = [other for other in able if is_noise(other)]
    able = noisy or able
    best = min(able, key=lambda other: (_options(other) != options, _value(other)), default=None)
    kld = None if best is None else kld_of(best)
    if best is None or kld is None:
        return None
    kind = "noise" if is_noise(best) else "unquantized"
    return Floor(engine=engine, label=best.label, kind=kind, kld=kld)


def at_floor(record: ResultRecord, records: Sequence[ResultRecord]) -> bool:
    """Whether a model's mean KLD is at or below its engine's floor, so that it says nothing."""
    kld, floor = kld_of(record), floor_of(record, records)
    return kld is not None and floor is not None and kld.value <= floor.kld.value


def with_floors(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """The same records, each comparison with its floor in it."""
    found = []
    for record in records:
        against = record.against_reference
        if against is not None:
            against = against.model_copy(update={"floor": floor_of(record, records)})
            record = record.model_copy(update={"against_reference": against})
        found.append(record)
    return found


def kld_of(record: ResultRecord) -> Estimate | None:
    """The exact mean KLD against the reference; None where there is none, or a lower bound only."""
    return None if record.against_reference is None else record.against_reference.metrics.get(KLD.name)


def engine_of(record: ResultRecord) -> str:
    """The engine that computed it, by its own name; a spec may have used an alias."""
    return str(record.identity.get("forward") or record.identity.get("engine") or record.engine)


def is_noise(record: ResultRecord) -> bool:
    """Whether it is the reference with noise on every layer."""
    return bool(_all_options(record).get(LAYER_NOISE))


def _makes_floor(record: ResultRecord) -> bool:
    """Whether its KLD is that of an engine and not of a quantization."""
    against = record.against_reference
    if against is None or kld_of(record) is None:
        return False
    if is_noise(record):
        return True
    unquantized = (record.layer_bpw or 0.0) >= UNQUANTIZED_BPW and not record.derived
    return unquantized and record.lora is None and not against.quantized


def _value(record: ResultRecord) -> float:
    kld = kld_of(record)
    assert kld is not None, "only records with a KLD make a floor"
    return kld.value


def _options(record: ResultRecord) -> dict[str, Any]:
    """The numeric options, without the noise."""
    return {name: value for name, value in _all_options(record).items() if name != LAYER_NOISE}


def _all_options(record: ResultRecord) -> dict[str, Any]:
    options = record.identity.get("options")
    return options if isinstance(options, dict) else {}
