"""What the store holds and the headers say -> a ResultRecord."""

import json
from collections.abc import Mapping
from typing import Any

from evalq.data.protocols import PROTOCOLS
from evalq.engine.failures import remedy_of
from evalq.errors import ModelError
from evalq.files import read_json, write_json
from evalq.results.by_position import own_by_position
from evalq.results.experts import EXPERTS, expert_notes, expert_use
from evalq.results.metrics import Measured, compute
from evalq.results.record import Failure, ResultRecord, read_record
from evalq.results.store import ResultDir
from evalq.results.tokens import TokenColumns
from evalq.run.prepare_data import PreparedData
from evalq.run.prepare_model import PreparedModel, Unprepared
from evalq.spec import ModelSpec
from evalq.version import METRICS_VERSION, __version__

# Facts of a run that stand elsewhere in the record.
_NOT_OF_EXECUTION = ("notes", "environment", EXPERTS)


def scored_record(
    model: PreparedModel, data: PreparedData, identity: dict[str, Any], result: ResultDir
) -> ResultRecord | None:
    """The record of a finished run, summed up from its stored scores, and kept as record.json.

    Returns:
        None when the scores are not there: another process removed them.

    Raises:
        ModelError: category non_finite, when too many log-probabilities are.
    """
    scores, run = result.scores(), result.run()
    if scores is None or not scores.belongs_to(data.plan):
        return None
    measured = Measured(scores.columns, data.plan.cluster_of, data.scale)
    metrics = compute(measured)
    by_position = own_by_position(measured, data.plan.table, scores.targets)
    speed = _speed_notes(model, scores)
    moe = expert_use(run.get(EXPERTS))
    notes = [
        *model.spec.notes,
        *model.engine.notes,
        *model.storage.findings,
        *data.notes,
        *_texts(run.get("notes")),
        *_bos_notes(data),
        *_count_notes(measured),
        *expert_notes(moe, data.plan.n_inputs),
        *speed,
    ]
    record = ResultRecord(
        status="ok",
        **_described(model.spec, data),
        **_bits(model),
        **_cache_bits(model, run),
        metrics=metrics,
        model=model.facts,
        tokens_scored=measured.n_tokens,
        tokens_nonfinite=measured.n_nonfinite,
        moe=moe,
        by_position=by_position,
        tokens_per_second=None if speed else scores.timing.tokens_per_second,
        load_seconds=_number(run.get("load_seconds")),
        peak_memory_gib=None if speed else _number(run.get("peak_memory_gib")),
        engine_version=_engine_version(model),
        scored_at=next(iter(_texts([run.get("finished_at")])), None),
        notes=list(dict.fromkeys(notes)),
        identity=identity,
        execution={
            "seconds": scores.timing.seconds if scores.timing.tokens else None,
            "options": model.engine.options,
            **{name: value for name, value in run.items() if name not in _NOT_OF_EXECUTION},
            "predicted": read_json(result.path / "predicted.json"),
            "environment": run.get("environment"),
            "evalq": __version__,
        },
        key=result.path.name,
    )
    write_json(result.path / "record.json", record.model_dump())
    return record


def remembered_record(
    model: Unprepared, data: PreparedData, key: str, result: ResultDir
) -> ResultRecord | None:
    """The stored record of a model whose files are gone; None when it was never scored on this data."""
    stored = read_record(result.path)
    scores = result.scores()
    if stored is None or stored.status != "ok" or scores is None or not scores.belongs_to(data.plan):
        return None
    when = f" of {stored.scored_at[:10]}" if stored.scored_at else ""
    note = f"a stored result{when}: {model.error.message}"
    update = _described(model.spec, data) | {"notes": [*stored.notes, note], "key": key}
    return stored.model_copy(update=update)


def failed_record(
    spec: ModelSpec, model: PreparedModel | None, data: PreparedData, error: ModelError, key: str | None
) -> ResultRecord:
    """The record of a model without a perplexity: what is known of it, and why."""
    return ResultRecord(
        status="failed",
        error=Failure(category=error.category, message=error.message, remedy=remedy_of(error)),
        **_described(spec, data),
        **({} if model is None else {**_bits(model), **_cache_bits(model, {})}),
        model=None if model is None else model.facts,
        engine_version=None if model is None else _engine_version(model),
        notes=[*spec.notes, *(() if model is None else model.engine.notes)],
        identity=data.comparison if model is None else {**data.comparison, **model.identity},
        key=key,
    )


def _speed_notes(model: PreparedModel, scores: TokenColumns) -> list[str]:
    """Speed and memory belong to the options a result was scored with, not to those asked for now."""
    asked = {k: v for k, v in model.engine.options.items() if k not in model.engine.numeric_options}
    try:
        used = json.loads(scores.timing.options) if scores.timing.options else None
    except ValueError:
        used = None
    if used is None:
        return [] if not asked else ["a stored result, speed and memory of these options were not measured"]
    was = {
        name: value
        for name, value in used.items()
        if name not in model.engine.numeric_options and name != "divide_work"
    }
    if was == asked:
        return []
    shown = ", ".join(f"{name} {value}" for name, value in sorted(was.items())) or "default options"
    return [f"a stored result, scored with {shown}: speed and memory of the options asked for are not known"]


def _texts(value: Any) -> list[str]:
    """The strings of a list of the store's JSON."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """A number of the store's JSON."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _described(spec: ModelSpec, data: PreparedData) -> dict[str, Any]:
    return {
        "metrics_version": METRICS_VERSION,
        "label": spec.plain_label,
        "group": spec.group,
        "color": spec.color,
        "engine": spec.load_fn,
        "lora": None if spec.lora is None else spec.lora.plain_name,
        "protocol": data.settings.name,
        "source": dict(data.text.origin),
        "comparison": data.comparison,
    }


def _bits(model: PreparedModel) -> dict[str, Any]:
    """Sizes from the headers, or the spec's override_* where those do not tell."""
    spec, storage = model.spec, model.storage
    vram_gb = storage.vram_gb if spec.override_vram_bits is None else spec.override_vram_bits / 8 / 2**30
    return {
        "layer_bpw": spec.override_bpw_layer or storage.layer_bpw,
        "head_bpw": spec.override_bpw_head or storage.head_bpw,
        "vram_gb": vram_gb,
        "disk_gib": storage.disk_gib,
        "format": storage.format,
        "derived": model.derived,
    }


def _cache_bits(model: PreparedModel, run: Mapping[str, Any]) -> dict[str, Any]:
    """The KV cache: as the options name it, else what the run tells of the engine's own."""
    cache = model.engine.kv_cache
    if cache is not None:
        return {
            "kv_cache": str(cache),
            "kv_bits": cache.bits,
            "kv_bits_k": cache.k_bits,
            "kv_bits_v": cache.v_bits,
        }
    bits = _number(run.get("kv_bits"))
    if bits is None and run.get("dtype"):  # keys and values are what the arithmetic makes
        bits = 32.0 if run["dtype"] == "float32" else 16.0
    return {"kv_bits": bits, "kv_bits_k": bits, "kv_bits_v": bits}


def _engine_version(model: PreparedModel) -> str:
    name, version = next(iter(model.versions.items()))
    return f"{name} {version}"


def _count_notes(measured: Measured) -> list[str]:
    if not measured.n_nonfinite:
        return []
    return [f"{measured.n_nonfinite} of {measured.n_tokens} log-probabilities are not finite and left out"]


def _bos_notes(data: PreparedData) -> list[str]:
    """A model trained with BOS at the start gives absurd numbers without; Gemma's reach the thousands."""
    plan, facts = data.plan, data.stream.facts
    if not facts.adds_bos or any(window.head != "keep" for window in plan.windows):
        return []
    if PROTOCOLS[data.settings.name].own_start:
        without = sum(data.stream.ids_N[window.start] != facts.bos_id for window in plan.windows)
        what = f"the tokenizer wants BOS first, the chat template writes none in {without} of "
        return [f"{what}{len(plan.windows)} conversations"] if without else []
    with_bos = "only the first window starts" if plan.windows[0].start == 0 else "no window starts"
    return [f'the tokenizer wants BOS first, {with_bos} with it: set "bos": "every_window" in the data spec']
