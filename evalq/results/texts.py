"""Several texts in one table: which records are of the same text, and short names that tell texts apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalq.results.record import ResultRecord, same_comparison

Comparison = Mapping[str, Any]

# What may tell two texts of one name apart, in the order in which it is tried.
_DIFFERENCES: tuple[Callable[[Comparison], str], ...] = (
    lambda facts: str(facts.get("protocol")),
    lambda facts: f"len {facts.get('eval_len')}",
    lambda facts: f"stride {facts.get('eval_stride')}",
    lambda facts: f"{facts.get('windows')} windows",
    lambda facts: f"bos {facts.get('bos')}",
    lambda facts: f"warmup {facts.get('warmup_tokens')}",
    lambda facts: f"{facts.get('tokens')} tokens",
    lambda facts: str(facts.get("text_sha256"))[:8],
    lambda facts: str(facts.get("tokens_sha256"))[:8],
    lambda facts: str(facts.get("plan_sha256"))[:8],
)


@dataclass(frozen=True)
class ByText:
    """The records of models that were all scored on the same texts.

    Args:
        names: of the texts, at least two.
        models: of each model its records, one a text, in the order of `names`.
    """

    names: tuple[str, ...]
    models: tuple[tuple[ResultRecord, ...], ...]

    @property
    def texts(self) -> dict[str, list[ResultRecord]]:
        """The records of each text, by its name, in the order of the models."""
        return {name: [records[i] for records in self.models] for i, name in enumerate(self.names)}


def by_text(records: Sequence[ResultRecord]) -> ByText | None:
    """Records as a table of models and texts; None where they are not of several texts with the same models.

    Records of models that cannot be compared, such as models with different tokenizers, make no such table.
    """
    groups: list[dict[str, ResultRecord]] = []
    for record in records:
        facts = record.comparison
        same = (g for g in groups if same_comparison(next(iter(g.values())).comparison, facts) is None)
        group = next(same, None)
        if group is None:
            groups.append({record.label: record})
        elif record.label in group:
            return None
        else:
            group[record.label] = record
    if len(groups) < 2 or any(group.keys() != groups[0].keys() for group in groups):
        return None
    names = text_names([next(iter(group.values())).comparison for group in groups])
    return ByText(tuple(names), tuple(tuple(group[label] for group in groups) for label in groups[0]))


def text_names(comparisons: Sequence[Comparison]) -> list[str]:
    """A name for each text: its data set or file, and what else it takes to tell it from the others.

    Args:
        comparisons: as in the records, no two the same.
    """
    names = [str(facts.get("dataset")) for facts in comparisons]
    for difference in _DIFFERENCES:
        for group in list(_of_one_name(names)):
            found = [difference(comparisons[i]) for i in group]
            if len(set(found)) > 1:
                for i, text in zip(group, found, strict=True):
                    names[i] = f"{names[i]} {text}"
    for group in list(_of_one_name(names)):
        for number, i in enumerate(group, 1):
            names[i] = f"{names[i]} #{number}"
    return names


def _of_one_name(names: Sequence[str]) -> Iterator[list[int]]:
    """Places of names that stand there more than once."""
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        if len(places) > 1:
            yield places
