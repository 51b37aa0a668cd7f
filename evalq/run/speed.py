"""Speed beside quality: what the store lacks of a model's figures is measured, in a process of its own.

Not in the one that scores: there the engine is set up for scoring (vLLM without CUDA graphs), and memory
holds what the scores are compared with. A model whose speed cannot be measured keeps its quality, with a note
why.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evalq.engine.registry import backend
from evalq.errors import ModelError
from evalq.machine import environment, this_machine
from evalq.results.record import ResultRecord
from evalq.results.speed import FIGURES, PARTS, Figure, KeptSpeed, Part, Repeated, Speed, SpeedSettings
from evalq.results.store import Store, key_of
from evalq.run.job import SpeedJob
from evalq.run.prepare_data import PreparedData
from evalq.run.prepare_model import PreparedModel
from evalq.run.process import Event, RunSettings, WorkerSettings, run_worker

# What a machine must share with another one for figures of the one to hold for the other.
_OF_THE_MACHINE = ("gpus", "driver", "cuda", "cpu", "cpu_cores", "cpu_threads", "system")
_OF_THE_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_GENERATES: tuple[Part, ...] = ("one", "batch")


def speed_settings(
    batch: int | None = None, new_tokens: int = 128, prompt_tokens: int = 512, repeats: int = 3
) -> SpeedSettings:
    """Sizes for this machine where none are given: a GPU gets 32 prompts at once, a CPU 4.

    Raises:
        SpecError: sizes that nothing can be measured with.
    """
    has_gpu = bool(this_machine().gpus)
    prompts = (32 if has_gpu else 4) if batch is None else batch
    found = SpeedSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=prompts,
        # A GPU needs some tens of thousands of tokens to show its speed.
        windows=4 * prompts if has_gpu else prompts,
        repeats=repeats,
    )
    found.require_possible()
    return found


def with_speed(
    records: Sequence[ResultRecord],
    model: PreparedModel,
    data: PreparedData,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> list[ResultRecord]:
    """A model's records with its speed, measured where the store has none for this machine.

    Args:
        records: of the model, one a text; where none was scored they come back as they are.
        model: whose they are.
        data: the text that prompts are cut from.
        store: keeps the figures.
        settings: of the run, with those of speed.
        say: told what happens.

    Raises:
        StoreError: the figures cannot be kept.
    """
    if settings.speed is None or all(record.status != "ok" for record in records):
        return list(records)
    speed = measured_speed(model, data, store, settings, say)
    reasons: dict[str, list[str]] = {}
    for figure, why in speed.not_measured.items():
        reasons.setdefault(why, []).append(WORDS[figure])
    notes = [f"speed not measured ({', '.join(what)}): {why}" for why, what in reasons.items()]
    return [
        record.model_copy(update={"speed": speed, "notes": list(dict.fromkeys([*record.notes, *notes]))})
        if record.status == "ok"
        else record
        for record in records
    ]


WORDS: dict[str, str] = {
    "generation": "generating",
    "generation_batch": "generating a batch",
    "first_token_seconds": "time to the first token",
    "scoring": "scoring",
}


def measured_speed(
    model: PreparedModel,
    data: PreparedData,
    store: Store,
    settings: RunSettings,
    say: Callable[[str], None],
) -> Speed:
    """A model's figures: those in the store, the others measured now. Raises StoreError."""
    assert settings.speed is not None
    belongs_to = _belongs_to(model, data, settings.speed)
    kept = store.speed(key_of(belongs_to), belongs_to)
    found = _Found(
        kept, Speed(settings=settings.speed) if settings.clear_cache else kept.read(settings.speed)
    )
    lacking = [part for part in PARTS if any(found.speed.get(figure) is None for figure in PARTS[part])]
    possible = [part for part in lacking if not found.refuse(part, _refused(part, model, settings.speed))]
    label = model.spec.plain_label
    for parts in _jobs(possible, backend(model.engine.forward).generates_apart):
        say(f"{label}: measuring speed ({', '.join(WORDS[PARTS[part][0]] for part in parts)})")
        log = kept.file.with_suffix(".log")
        worker = WorkerSettings(model.python, settings.timeout_seconds, settings.offline, log)
        try:
            run_worker(_job(model, data, parts, settings.speed), worker, found.event)
        except ModelError as error:
            for part in parts:
                found.refuse(part, error.message)
    if lacking:
        say(f"{label}: {_told(found.speed)}")
    return found.speed


class _Found:
    """The figures so far; each is kept as soon as it is there."""

    def __init__(self, kept: KeptSpeed, speed: Speed) -> None:
        self._kept, self.speed = kept, speed

    def event(self, event: Event) -> None:
        """A worker's word."""
        if event["event"] == "loaded":
            self._update(device=str(event["device"]))
        elif event["event"] == "speed" and event["figure"] in FIGURES:
            self._update(**{event["figure"]: Repeated.of(event["values"])})
            self._kept.write(self.speed)
        elif event["event"] == "not_measured" and event["part"] in PARTS:
            self.refuse(event["part"], str(event["message"]))

    def refuse(self, part: Part, why: str | None) -> bool:
        """Note why a part was not measured, for its figures that are not there; None notes nothing."""
        if why is None:
            return False
        reasons = {figure: why for figure in PARTS[part] if self.speed.get(figure) is None}
        self._update(not_measured=self.speed.not_measured | reasons)
        return True

    def _update(self, **changes: Any) -> None:
        self.speed = self.speed.model_copy(update=changes)


def _refused(part: Part, model: PreparedModel, settings: SpeedSettings) -> str | None:
    """Why a part cannot be measured, where that is known without loading the model."""
    positions = model.checkpoint.max_positions
    if part in _GENERATES:
        if not backend(model.engine.forward).generates:
            return f"{model.engine.forward} does not generate here"
        if positions is not None and settings.positions > positions:
            return (
                f"{settings.prompt_tokens} tokens of a prompt and {settings.new_tokens} new ones need "
                f"{settings.positions} positions, the model has {positions}"
            )
    elif positions is not None and settings.prompt_tokens - 1 > positions:
        return f"a prompt has {settings.prompt_tokens} tokens, the model {positions} positions"
    return None


def _jobs(parts: Iterable[Part], apart: bool) -> list[tuple[Part, ...]]:
    """What one load measures: everything, or generating and scoring apart."""
    every = tuple(parts)
    groups = [every]
    if apart:
        groups = [tuple(p for p in every if p in _GENERATES), tuple(p for p in every if p not in _GENERATES)]
    return [group for group in groups if group]


def _belongs_to(model: PreparedModel, data: PreparedData, settings: SpeedSettings) -> dict[str, Any]:
    """Everything that figures depend on: a model's identity, every option, the prompts, the machine."""
    here = environment()
    return {
        "kind": "speed",
        "model": model.identity,
        "options": model.engine.options,
        "prompts": data.tokens_file.stem,
        "settings": settings.model_dump(),
        "machine": {name: here.get(name) for name in _OF_THE_MACHINE},
        "environment": {name: os.environ.get(name) for name in _OF_THE_ENVIRONMENT},
    }


def _job(
    model: PreparedModel, data: PreparedData, parts: tuple[Part, ...], settings: SpeedSettings
) -> SpeedJob:
    return SpeedJob(
        **model.for_job,
        tokens_file=str(data.tokens_file.resolve()),
        parts=parts,
        settings=settings,
    )


def _told(speed: Speed) -> str:
    """The figures in one line."""
    told = [f"{WORDS[figure]} not measured: {why}" for figure, why in speed.not_measured.items()]
    rates: list[tuple[Figure, str]] = [
        ("generation", "generating"),
        ("generation_batch", f"{speed.settings.batch} at once"),
        ("scoring", "scoring"),
    ]
    shown = [
        f"{words} {found.median:,.1f} tok/s"
        for figure, words in rates
        if (found := speed.get(figure)) is not None
    ]
    first = speed.first_token_seconds
    if first is not None:
        shown.append(f"first token after {1000 * first.median:,.0f} ms")
    return "; ".join([*shown, *told])
