"""Labels: each model of a table and a chart has one of its own."""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from evalq.errors import SpecError
from evalq.spec.model import ModelSpec


def tell_apart(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """The same models; where a label stands twice, each gets what differs behind it, and a note.

    What differs is the folder, else the revision, the adapter, the engine. Models that differ in none of them
    keep their label: `require_unique_labels` refuses them.
    """
    same: dict[str, list[ModelSpec]] = {}
    for spec in specs:
        same.setdefault(spec.plain_label, []).append(spec)
    renamed: dict[int, ModelSpec] = {}
    for label, group in same.items():
        suffixes = (
            next(filter(None, (find(group) for find in _DIFFERENCES)), None) if len(group) > 1 else None
        )
        for spec, suffix in zip(group, suffixes or (), strict=False):
            renamed[id(spec)] = _with_suffix(spec, label, suffix)
    return [renamed.get(id(spec), spec) for spec in specs]


def require_unique_labels(specs: Sequence[ModelSpec]) -> None:
    """Raise SpecError for two models with one label: a table or chart could not tell them apart."""
    seen: dict[str, ModelSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.plain_label, spec)
        if other is not spec:
            raise SpecError(
                f'{spec.where}.label: "{spec.plain_label}" is also the label of {other.where}',
                "give each model a label of its own",
            )


def _with_suffix(spec: ModelSpec, label: str, suffix: str) -> ModelSpec:
    color = f" [{spec.color}]" if spec.color else ""
    changed = spec.model_copy(update={"label": f"{label} ({suffix}){color}"})
    changed._notes = (*spec._notes, f'another model has the label "{label}" too: told apart by {suffix}')
    return changed


def _folders(group: Sequence[ModelSpec]) -> list[str] | None:
    """The shortest ends of their paths that differ."""
    paths = [PurePosixPath(spec.main_dir.rstrip("/")).parts for spec in group]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(path[-length:]) for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return None


def _texts(what: Callable[[ModelSpec], str | None]) -> Callable[[Sequence[ModelSpec]], list[str] | None]:
    def find(group: Sequence[ModelSpec]) -> list[str] | None:
        values = [what(spec) or "default" for spec in group]
        return values if len(set(values)) == len(values) else None

    return find


_DIFFERENCES = (
    _folders,
    _texts(lambda spec: spec.revision),
    _texts(lambda spec: spec.lora.plain_name if spec.lora else None),
    _texts(lambda spec: spec.load_fn),
)
