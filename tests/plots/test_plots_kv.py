"""The chart against bits of the KV cache."""

import pytest
from test_plots import failed, record, texts

from evalq.errors import SpecError
from evalq.plots.scatter import ChartOptions, draw
from evalq.plots.selection import select
from evalq.results.record import ResultRecord

KV = ChartOptions(x="kv")


def cached(label: str, bits: float, ppl: float, layer_bpw: float = 16.0) -> ResultRecord:
    return record(label, layer_bpw, ppl, kv_cache="q8_0", kv_bits=bits)


RECORDS = [
    record("F16 plain", 16.0, 20.0, kv_bits=16.0),
    cached("F16 kv q8_0", 8.5, 20.1),
    cached("F16 kv q4_0", 4.5, 21.0),
    cached("Q4 kv q8_0", 8.5, 25.0, layer_bpw=4.5),
    record("old", 8.0, 22.0),
    failed("broken", "not_measured"),
]


def test_points_stand_at_the_bits_of_their_cache() -> None:
    chosen = select(RECORDS, KV)
    assert [(point.name, point.x) for point in chosen.points] == [
        ("plain", 16.0), ("kv q8_0", 8.5), ("kv q4_0", 4.5), ("kv q8_0", 8.5),
    ]  # fmt: skip
    assert chosen.failed == ["old (bits of the KV cache unknown)", "broken (not_measured)"]


@pytest.mark.parametrize("options", [KV, ChartOptions()])
def test_only_an_unquantized_cache_has_a_line(options: ChartOptions) -> None:
    chosen = select(RECORDS, options)
    assert [point.name for point in chosen.points if point.has_line] == ["plain"]


def test_axis_and_title_name_it() -> None:
    found = texts(draw(RECORDS, KV))
    assert {"bits per element of the KV cache", "Perplexity against bits of the KV cache"} <= set(found)


def test_models_beyond_the_axis_are_named_with_its_unit() -> None:
    chosen = select(RECORDS, ChartOptions(x="kv", max_x=10))
    assert chosen.beyond == ["F16 plain (16.00 KV bits, 20.00)"]
    assert [point.name for point in chosen.levels] == ["plain"]


def test_another_axis_is_refused() -> None:
    with pytest.raises(SpecError, match="bpw, vram, kv"):
        ChartOptions(x="cache")  # type: ignore[arg-type]
