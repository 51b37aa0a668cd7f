"""What the store holds and the headers say -> a ResultRecord."""

from collections.abc import Sequence
from typing import Any

from evalq.data.windows import StreamFacts, WindowPlan
from evalq.errors import ModelError, StoreError
from evalq.failures import remedy_of
from evalq.files import read_json, write_json
from evalq.results.metrics import Summary, paired_difference, summarize
from evalq.results.record import AgainstReference, Failure, ResultRecord
from evalq.results.store import ResultDir, Store
from evalq.run.prepare_data import Data
from evalq.run.prepare_model import Prepared
from evalq.spec import ModelSpec
from evalq.version import METRICS_VERSION, __version__


def scored_record(model: Prepared, data: Data, identity: dict[str, Any], result: ResultDir) -> ResultRecord:
    """The record of a finished run, summed up from its stored scores, and kept as record.json.

    Raises:
        ModelError: category non_finite, when too many log-probabilities are.
        StoreError: the scores are gone.
    """
    scores, run = result.scores(), read_json(result.path / "run.json")
    if scores is None or run is None:
        raise StoreError(f"{result.path} holds no finished scores", "run again")
    summary = summarize(scores.logprob, scores.top1, scores.window, data.plan.overlapping, scale=data.scale)
    notes = [
        *model.storage.findings,
        *run["notes"],
        *_bos_notes(data.plan, data.stream.facts),
        *_count_notes(summary),
    ]
    record = ResultRecord(
        status="ok",
        **_described(model.spec, data),
        **_bits(model),
        ppl=summary.ppl,
        ppl_stderr=summary.ppl_stderr,
        ppl_stderr_is_lower_bound=summary.stderr_is_lower_bound,
        nll_nats=summary.nll_nats,
        bits_per_byte=summary.bits_per_byte,
        word_ppl=summary.word_ppl,
        top1=summary.top1,
        tokens_scored=summary.tokens_scored,
        tokens_nonfinite=summary.tokens_nonfinite,
        tokens_per_second=summary.tokens_scored / scores.seconds if scores.seconds else None,
        load_seconds=run["load_seconds"],
        peak_memory_gib=run["peak_memory_gib"],
        engine_version=_engine_version(model),
        notes=list(dict.fromkeys(notes)),
        identity=identity,
        execution={
            "seconds": scores.seconds,
            **{name: value for name, value in run.items() if name != "notes"},
            "options": model.engine.options,
            "predicted": read_json(result.path / "predicted.json"),
            "environment": read_json(result.path / "environment.json"),
            "evalq": __version__,
        },
        key=result.path.name,
    )
    write_json(result.path / "record.json", record.model_dump())
    return record


def failed_record(
    spec: ModelSpec, model: Prepared | None, data: Data, error: ModelError, key: str | None
) -> ResultRecord:
    """The record of a model without a perplexity: what is known of it, and why."""
    return ResultRecord(
        status="failed",
        error=Failure(category=error.category, message=error.message, remedy=remedy_of(error)),
        **_described(spec, data),
        **({} if model is None else _bits(model)),
        engine_version=None if model is None else _engine_version(model),
        identity=data.comparison if model is None else {**data.comparison, **model.identity},
        key=key,
    )


def with_reference(
    records: list[ResultRecord], specs: Sequence[ModelSpec], store: Store
) -> list[ResultRecord]:
    """The same records, each scored one compared with the reference on the tokens both scored.

    The reference is the first model whose spec has out_logits, else the scored one with the most bits per
    weight (the first of several).
    """
    scored = [record for record in records if record.status == "ok" and record.layer_bpw is not None]
    if len(scored) < 2:
        return records
    marked = {spec.plain_label for spec in specs if spec.out_logits is not None}
    reference = max(scored, key=lambda record: (record.label in marked, record.layer_bpw or 0.0))
    base = store.result(str(reference.key)).scores()
    found = []
    for record in records:
        mine = (
            store.result(str(record.key)).scores()
            if record.status == "ok" and record is not reference
            else None
        )
        if base is None or mine is None:
            found.append(record)
            continue
        pair = paired_difference(mine.logprob, base.logprob, mine.window)
        against = AgainstReference(
            label=reference.label,
            ppl_ratio=pair.ratio,
            ln_ratio=pair.nll_nats,
            ln_ratio_stderr=pair.stderr_nats,
            significant=pair.significant,
        )
        found.append(record.model_copy(update={"against_reference": against}))
    return found


def _described(spec: ModelSpec, data: Data) -> dict[str, Any]:
    return {
        "metrics_version": METRICS_VERSION,
        "label": spec.plain_label,
        "group": spec.group,
        "color": spec.color,
        "engine": spec.load_fn,
        "lora": None if spec.lora is None else spec.lora.plain_name,
        "protocol": data.settings.name,
        "comparison": data.comparison,
    }


def _bits(model: Prepared) -> dict[str, Any]:
    """Sizes from the headers, or the spec's override_* where those do not tell."""
    spec, storage = model.spec, model.storage
    vram_gb = storage.vram_gb if spec.override_vram_bits is None else spec.override_vram_bits / 8 / 2**30
    return {
        "layer_bpw": spec.override_bpw_layer or storage.layer_bpw,
        "head_bpw": spec.override_bpw_head or storage.head_bpw,
        "vram_gb": vram_gb,
        "disk_gib": storage.disk_gib,
        "format": storage.format,
    }


def _engine_version(model: Prepared) -> str:
    name, version = next(iter(model.versions.items()))
    return f"{name} {version}"


def _count_notes(summary: Summary) -> list[str]:
    if not summary.tokens_nonfinite:
        return []
    return [
        f"{summary.tokens_nonfinite} of {summary.tokens_scored} log-probabilities are not finite and left out"
    ]


def _bos_notes(plan: WindowPlan, facts: StreamFacts) -> list[str]:
    """A model trained with BOS at the start gives absurd numbers without; Gemma's reach the thousands."""
    if not facts.adds_bos or any(window.head != "keep" for window in plan.windows):
        return []
    with_bos = "only the first window starts" if plan.windows[0].start == 0 else "no window starts"
    return [f'the tokenizer wants BOS first, {with_bos} with it: set "bos": "every_window" in the data spec']
