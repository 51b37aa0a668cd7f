"""Models with different tokenizers on one text: each reads its own tokens, and bits per byte compare them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from evalq.data.protocols import PROTOCOLS
from evalq.data.sources import Text
from evalq.errors import DataError, ModelError, SpecError
from evalq.results.per_byte import ByteScores, beside, by_bytes, measured
from evalq.results.record import ResultRecord
from evalq.results.reference import Reference
from evalq.results.store import Store
from evalq.run.prepare_data import PreparedData, choose_tokenizer, tokenized
from evalq.run.prepare_model import PreparedModel, Unprepared
from evalq.run.process import RunSettings
from evalq.spec import DataSpec

Model = PreparedModel | Unprepared
_NOT_TOLD = "the kept tokens do not tell their bytes"


@dataclass(frozen=True)
class OwnTokens:
    """The texts in the tokens of one model.

    Args:
        data: one a text.
        unknown: why the bytes of its tokens are not known, None where they are.
    """

    data: tuple[PreparedData, ...]
    unknown: str | None

    @property
    def refused(self) -> ModelError | None:
        """Why the model has no bits per byte, None where it has."""
        if self.unknown is None:
            return None
        message = f"no bits per byte: {self.unknown}"
        return ModelError(message, "tokenizer_mismatch", "score this model without --per-byte")


def own_tokens(
    models: Sequence[Model],
    specs: Sequence[DataSpec],
    texts: Sequence[Text],
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> dict[str, OwnTokens]:
    """Every model's own tokens of the texts, by its label; tokens that are the same are prepared once.

    A model without tokenizer files reads those of the first model that has some, and is refused later where
    they are not its own.

    Raises:
        SpecError: a text is written by the models' own chat templates, or by a model.
        DataError: no model has a tokenizer, or a text is too short for a model's windows.
    """
    for spec in specs:
        if PROTOCOLS[spec.protocol].text == "conversations":
            raise SpecError(
                f"--per-byte: protocol {spec.protocol} scores what each model's own chat template writes",
                "take another protocol: bits per byte compare models on the same text",
            )
    found: dict[str, OwnTokens] = {}
    for model in models:
        try:
            chosen = [choose_tokenizer(spec, [model], store, settings.offline) for spec in specs]
        except DataError:
            chosen = [choose_tokenizer(spec, models, store, settings.offline) for spec in specs]
        data = tuple(
            tokenized(spec, text, tokenizer, store, settings, say, with_bytes=True)
            for spec, text, tokenizer in zip(specs, texts, chosen, strict=True)
        )
        unknown = next((one.stream.bytes_unknown or _NOT_TOLD for one in data if _untold(one)), None)
        found[model.spec.plain_label] = OwnTokens(data, unknown)
    return found


def _untold(data: PreparedData) -> bool:
    """Whether it is not known how many bytes each token stands for."""
    return data.stream.bytes_N is None


def compared_by_bytes(
    records: Sequence[ResultRecord],
    data: Mapping[str, PreparedData],
    reference: Reference | None,
    store: Store,
) -> list[ResultRecord]:
    """Records of one text as they stand in a table of bits per byte, each beside the reference.

    Args:
        records: of every model.
        data: the text in the tokens of each, by label.
        reference: of the run, None without.
        store: holds their scores.
    """
    found = [by_bytes(record) for record in records]
    scores: dict[str, ByteScores] = {}
    for i, record in enumerate(found):
        mine = _scores(record, data[record.label], store)
        if mine is not None:
            scores[record.label], found[i] = mine, measured(record, mine)
    base = next((r for r in found if reference and r.label == reference.label and r.label in scores), None)
    if reference is None or base is None:
        return found
    theirs = scores.pop(base.label)
    return [
        base.model_copy(update={"is_reference": True})
        if record is base
        else beside(record, scores[record.label], base, theirs, reference.quantized)
        if record.label in scores
        else record
        for record in found
    ]


def _scores(record: ResultRecord, data: PreparedData, store: Store) -> ByteScores | None:
    """A scored model's scores with the bytes of their tokens; None where there are none."""
    columns = store.result(str(record.key)).scores() if record.status == "ok" else None
    if columns is None or data.stream.bytes_N is None:
        return None
    windows = data.plan.table if columns.windows is None else columns.windows
    columns = replace(columns, windows=windows)
    return ByteScores.of(columns, data.stream.bytes_N, data.settings.name, data.scale.n_bytes)
