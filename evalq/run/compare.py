"""Data specs and models: the whole way from specs to records.

A model that fails becomes a record with the reason, and the next one goes on; one that fails on one text is
scored on the others. Only what is wrong with a data spec, the command line or the store ends the run.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from evalq.data.sources import Text, load_text
from evalq.engine.registry import resolve_engine
from evalq.errors import ModelError, SpecError, StoreError
from evalq.files import write_json
from evalq.results.floor import with_floors
from evalq.results.record import ResultRecord
from evalq.results.reference import Candidate, Reference, choose, with_reference
from evalq.results.store import Store
from evalq.results.texts import text_names
from evalq.run.answers import answered, model_of
from evalq.run.beside import Asked, asked_of_others, asked_of_reference, kept_reference, noisy_reference
from evalq.run.outcome import failed_record
from evalq.run.per_byte import compared_by_bytes, own_tokens
from evalq.run.prepare_data import PreparedData, choose_tokenizer, tokenized
from evalq.run.prepare_model import PreparedModel, Unprepared, prepare
from evalq.run.process import Event, RunSettings
from evalq.run.speed import with_speed
from evalq.run.turn import Outcome, TextAsked, take_turn
from evalq.spec import DataSpec, ModelSpec, require_unique_labels

# By a model's label: the texts by their names.
_DataOfModels = Mapping[str, Mapping[str, PreparedData]]


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
    data, unable = _prepared(data_specs, texts, models, reference, store, settings, reporter)
    records = _score_all(models, data, unable, reference, store, settings, reporter)
    compared = []
    for i, (name, say) in enumerate(_saying(reporter, _any(data)).items()):
        in_order = [records[model.spec.plain_label][i] for model in models]
        standing = _standing(in_order, models, reference, say)
        if settings.per_byte:
            of_text = {label: texts_of[name] for label, texts_of in data.items()}
            compared.append(compared_by_bytes(in_order, of_text, standing, store))
        else:
            compared.append(_compared(in_order, standing, store))
    return [of_text[i] for i in range(len(models)) for of_text in compared]


def _prepared(
    specs: Sequence[DataSpec],
    texts: Sequence[Text],
    models: Sequence[PreparedModel | Unprepared],
    reference: Reference | None,
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> tuple[_DataOfModels, dict[str, ModelError]]:
    """The texts by name for each model by label, and which models cannot be scored on them.

    All models read the same tokens, except where bits per byte compare models with different tokenizers. A
    text that is to be generated is what the reference answers.
    """
    labels = [model.spec.plain_label for model in models]
    if settings.per_byte:
        own = own_tokens(models, specs, texts, store, settings, reporter.status)
        names = list(_named(own[labels[0]].data))
        data = {label: dict(zip(names, own[label].data, strict=True)) for label in labels}
        return data, {label: found.refused for label, found in own.items() if found.refused is not None}
    prepared = []
    for spec, text in zip(specs, texts, strict=True):
        if spec.generate is not None:
            model = model_of(reference, models)
            prepared.append(answered(spec, text, model, store, settings, reporter.status))
            continue
        chosen = choose_tokenizer(spec, models, store, settings.offline)
        prepared.append(tokenized(spec, text, chosen, store, settings, reporter.status))
    return dict.fromkeys(labels, _named(prepared)), {}


def _any(data: _DataOfModels) -> Mapping[str, PreparedData]:
    """The texts of the first model: their names are those of all."""
    return next(iter(data.values()))


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
    data_of: _DataOfModels,
    unable: Mapping[str, ModelError],
    reference: Reference | None,
    store: Store,
    settings: RunSettings,
    reporter: Reporter,
) -> dict[str, list[ResultRecord]]:
    """Each model's records, in the order of the texts; the reference goes first."""
    first = None if reference is None else reference.label
    records: dict[str, list[ResultRecord]] = {}
    names = list(_any(data_of))
    asked: dict[str, Asked] = dict.fromkeys(names, asked_of_others(settings, None))
    say = _saying(reporter, names)
    for model in sorted(models, key=lambda model: model.spec.plain_label != first):
        label = model.spec.plain_label
        data = data_of[label]
        reporter.model(label, {name: len(one.plan.windows) for name, one in data.items()})
        of_model = dict.fromkeys(data, asked_of_reference(settings)) if label == first else asked
        texts = [TextAsked(name, one, of_model[name]) for name, one in data.items()]
        if label in unable:
            prepared = model if isinstance(model, PreparedModel) else None
            failed = [failed_record(model.spec, prepared, one, unable[label], None) for one in data.values()]
            outcomes = [Outcome(record, False) for record in failed]
        else:
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


def _standing(
    records: list[ResultRecord],
    models: list[PreparedModel | Unprepared],
    reference: Reference | None,
    say: Callable[[str], None],
) -> Reference | None:
    """The reference of one text's records; the next by rule where one that the rule chose failed."""
    scored = [record for record in records if record.status == "ok"]
    if reference is not None and any(record.label == reference.label for record in scored):
        return reference
    if reference is not None and scored:
        what = f'the reference "{reference.label}" was not scored'
        say(what if reference.by_hand else f"{what}: another one takes its place")
    if reference is not None and reference.by_hand:
        return reference
    by_label = {model.spec.plain_label: model for model in models}
    return choose(
        [Candidate(r.label, r.layer_bpw, getattr(by_label[r.label], "derived", False)) for r in scored]
    )


def _compared(records: list[ResultRecord], reference: Reference | None, store: Store) -> list[ResultRecord]:
    """The records of one text beside the reference, kept as they are then."""
    found = with_floors(
        with_reference(records, reference, lambda record: store.result(str(record.key)).scores())
    )
    for record in found:
        if record.status == "ok" and record.key is not None:
            with contextlib.suppress(StoreError):
                write_json(store.result(record.key).path / "record.json", record.model_dump())
    return found
