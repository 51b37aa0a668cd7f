"""What a comparison asks of each model, the reference and the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalq.engine.backend import LAYER_NOISE
from evalq.engine.columns import DISTRIBUTION_COLUMNS, DIVERGENCE_COLUMNS
from evalq.engine.registry import resolve_engine
from evalq.results.kept import KeptReference
from evalq.results.record import ResultRecord
from evalq.results.reference import Reference
from evalq.results.store import Store, family_of
from evalq.run.prepare_data import PreparedData
from evalq.run.prepare_model import PreparedModel, Unprepared, prepare
from evalq.run.process import RunSettings


@dataclass(frozen=True)
class Asked:
    """What is asked of one model.

    Args:
        columns: plain names; the first one is required.
        keep: its rows, for others to be compared with.
        kept: rows of the model that it is compared with, None without.
    """

    columns: tuple[str, ...]
    keep: bool = False
    kept: KeptReference | None = None


def asked_of_reference(settings: RunSettings) -> Asked:
    """What the model that the others are compared with has to say."""
    if not settings.kld:
        return Asked(settings.columns)
    return Asked((*settings.columns, *DISTRIBUTION_COLUMNS), keep=True)


def asked_of_others(settings: RunSettings, kept: KeptReference | None) -> Asked:
    """What the others have to say; without a kept reference nothing beside it."""
    if not settings.kld:
        return Asked(settings.columns)
    columns = (*settings.columns, *DISTRIBUTION_COLUMNS)
    return Asked(columns if kept is None else (*columns, *DIVERGENCE_COLUMNS), kept=kept)


NOISE = 2.0**-9


def noisy_reference(
    models: Sequence[PreparedModel | Unprepared],
    reference: Reference | None,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> list[PreparedModel | Unprepared]:
    """The reference once more, with noise in its layers; nothing, and why, where its engine has none."""
    spec = next((m.spec for m in models if reference and m.spec.plain_label == reference.label), None)
    if spec is None:
        say("no noise floor: there is no reference")
        return []
    engine = resolve_engine(spec)
    if LAYER_NOISE not in engine.loader.options:
        say(f"no noise floor: {engine.load} puts no noise into layers; a reference in hf does")
        return []
    changes = {
        "label": f"{spec.plain_label} noise floor",
        "options": {**spec.options, LAYER_NOISE: NOISE},
        "reference": False,
        "out_logits": None,
    }
    return [prepare(spec.model_copy(update=changes), store, settings.offline)]


def kept_reference(
    record: ResultRecord, data: PreparedData, store: Store, say: Callable[[str], None]
) -> KeptReference | None:
    """What a scored reference has left for the others; None, and why, where that is not whole."""
    if record.status != "ok":
        say(f'no KL divergence: the reference "{record.label}" was not scored')
        return None
    kept = store.reference(family_of(record.identity))
    head = kept.head()
    if head is None or not kept.there(data.plan).all():
        why = next((note for note in record.notes if note.startswith("no KL divergence")), "")
        say(f'{why or "no KL divergence against it"} (the reference, "{record.label}")')
        return None
    weight = head.weight
    if weight is not None and not Path(weight.file).is_file():
        say(f'no KL divergence: the head of the reference "{record.label}" is gone: {weight.file}')
        return None
    return kept
