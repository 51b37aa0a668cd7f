"""Data specs and models: the whole way from specs to records.

A model that fails becomes a record with the reason, and the next one goes on; one that fails on one text is
scored on the others. Only what is wrong with a data spec, the command line or the store ends the run.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from evalq.data.sources import load_text
from evalq.engine.registry import resolve_engine
from evalq.errors import ModelError, SpecError, StoreError
from evalq.files import write_json
from evalq.results.floor import with_floors
from evalq.results.record import ResultRecord
from evalq.results.reference import Candidate, Reference, choose, with_reference
from evalq.results.store import Store
from evalq.results.texts import text_names
from evalq.run.beside import Asked, asked_of_others, asked_of_reference, kept_reference, noisy_reference
from evalq.run.prepare_data import PreparedData, choose_tokenizer, tokenized
from evalq.run.prepare_model import PreparedModel, Unprepared, prepare
from evalq.run.process import Event, RunSettings
from evalq.run.speed import with_speed
from evalq.run.turn import TextAsked, take_turn
from evalq.spec import DataSpec, ModelSpec, require_unique_labels


class Reporter(Protocol):
    """Who is told what happens while it happens."""

    def status(self, text: str) -> None:
        """Something that is no model's, such as tokenizing."""
        ...

    def model(self, label: str, texts: Mapping[str, int]) -> None:
        """A model's turn has come: the names of the texts and how many windows each has."""
        ...

    def event(self, event: Event) -> None:
        """What its worker said."""
        ...

    def record(self, record: ResultRecord, cached: bool, text: str) -> None:
        """Its result on a text."""
        ...


def compare(
    data_specs: Sequence[DataSpec],
    specs: Sequence[ModelSpec],
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> list[ResultRecord]:
    """Score every model on every text, or fetch what the store already holds; failures are records too.

    Returns:
        A record for each pair: the first model on every text in the order of `data_specs`, then the second.

    Raises:
        SpecError, DataError, StoreError: nothing more can be scored; what was scored is in the store.
        KeyboardInterrupt: after the running worker was ended.
    """
    require_unique_labels(list(specs))
    for spec in specs:
        with contextlib.suppress(ModelError):  # of that model alone; prepare() makes a record of it
            resolve_engine(spec)  # a typo in the last model must not be found after a night of scoring
    texts = [load_text(spec, store.texts, settings.offline) for spec in data_specs]
    models = [prepare(spec, store, settings.offline) for spec in specs]
    reference = choose([_candidate(model) for model in models], settings.reference)
    if settings.noise_floor:
        models += noisy_reference(models, reference, store, settings, reporter.status)
    prepared = []
    for data_spec, text in zip(data_specs, texts, strict=True):
        chosen = choose_tokenizer(data_spec, models, store, settings.offline)
        prepared.append(tokenized(data_spec, text, chosen, store, settings, reporter.status))
    data = _named(prepared)
    records = _score_all(models, data, reference, store, settings, reporter)
    compared = []
    for i, say in enumerate(_saying(reporter, data).values()):
        in_order = [records[model.spec.plain_label][i] for model in models]
        compared.append(_compared(in_order, models, reference, store, say))
    return [of_text[i] for i in range(len(models)) for of_text in compared]


def _named(prepared: Sequence[PreparedData]) -> dict[str, PreparedData]:
    """The texts by names that tell them apart. Raises SpecError for two that are the same."""
    comparisons = [data.comparison for data in prepared]
    contents = [{k: v for k, v in facts.items() if k != "dataset"} for facts in comparisons]
    for i, data in enumerate(prepared):
        first = contents.index(contents[i])
        if first < i:
            raise SpecError(
                f"-d: number {first + 1} and number {i + 1} are the same windows of the same text "
                f"({data.text.name}, protocol {data.settings.name})",
                "name each text once",
            )
    return dict(zip(text_names(comparisons), prepared, strict=True))


def _saying(reporter: Reporter, names: Iterable[str]) -> dict[str, Callable[[str], None]]:
    """Who is told what is about one text; its name goes before it where there are several."""

    def naming(name: str) -> Callable[[str], None]:
        return lambda said: reporter.status(f"{name}: {said}")

    several = list(names)
    return {name: naming(name) if len(several) > 1 else reporter.status for name in several}


def _score_all(
    models: Sequence[PreparedModel | Unprepared],
    data: Mapping[str, PreparedData],
    reference: Reference | None,
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> dict[str, list[ResultRecord]]:
    """Each model's records, in the order of the texts; the reference goes first."""
    first = None if reference is None else reference.label
    records: dict[str, list[ResultRecord]] = {}
    asked: dict[str, Asked] = dict.fromkeys(data, asked_of_others(settings, None))
    say = _saying(reporter, data)
    for model in sorted(models, key=lambda model: model.spec.plain_label != first):
        label = model.spec.plain_label
        reporter.model(label, {name: len(one.plan.windows) for name, one in data.items()})
        of_model = dict.fromkeys(data, asked_of_reference(settings)) if label == first else asked
        texts = [TextAsked(name, one, of_model[name]) for name, one in data.items()]
        outcomes = take_turn(model, texts, store, settings, reporter)
        for name, outcome in zip(data, outcomes, strict=True):
            reporter.record(outcome.record, outcome.cached, name)
        records[label] = [outcome.record for outcome in outcomes]
        if settings.speed is not None and isinstance(model, PreparedModel):
            of_first_text = next(iter(data.values()))
            records[label] = with_speed(
                records[label], model, of_first_text, store, settings, reporter.status
            )
        if label == first and settings.kld:
            for (name, one), record in zip(data.items(), records[label], strict=True):
                asked[name] = asked_of_others(settings, kept_reference(record, one, store, say[name]))
    return records


def _candidate(model: PreparedModel | Unprepared) -> Candidate:
    marked = 2 if model.spec.reference else int(model.spec.out_logits is not None)
    label = model.spec.plain_label
    if isinstance(model, Unprepared):
        return Candidate(label, None, marked=marked)
    bpw = model.spec.override_bpw_layer or model.storage.layer_bpw
    return Candidate(label, bpw, model.derived, marked)


def _compared(
    records: list[ResultRecord],
    models: list[PreparedModel | Unprepared],
    reference: Reference | None,
    store: Store,
    say: Callable[[str], None],
) -> list[ResultRecord]:
    """The records of one text beside the reference; the next by rule where one that the rule chose failed."""
    scored = [record for record in records if record.status == "ok"]
    if reference is None or all(record.label != reference.label for record in scored):
        if reference is not None and scored:
            what = f'the reference "{reference.label}" was not scored'
            say(what if reference.by_hand else f"{what}: another one takes its place")
        if reference is None or not reference.by_hand:
            by_label = {model.spec.plain_label: model for model in models}
            left = [
                Candidate(r.label, r.layer_bpw, getattr(by_label[r.label], "derived", False)) for r in scored
            ]
            reference = choose(left)
    found = with_floors(
        with_reference(records, reference, lambda record: store.result(str(record.key)).scores())
    )
    for record in found:
        if record.status == "ok" and record.key is not None:
            with contextlib.suppress(StoreError):
                write_json(store.result(record.key).path / "record.json", record.model_dump())
    return found
