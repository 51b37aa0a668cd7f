"""Floors in words, on terminals and in Markdown."""

import csv
import json

from result_records import diverging, record, terminal

from evalq.results.floor import with_floors
from evalq.results.record import ResultRecord
from evalq.show import table
from evalq.show.floors import floor_lines

EVIL = "BF16 \x1b[2J|<b>"


def run(kld: float, control: str = "BF16 vLLM") -> list[ResultRecord]:
    """The reference in hf, a null control in vllm, quantized models in vllm and gguf."""
    return [
        record("BF16", layer_bpw=16.0, identity={"forward": "hf"}, is_reference=True),
        record(
            control, layer_bpw=16.0, identity={"forward": "vllm"},
            against_reference=diverging("BF16", 0.00031, 0.00002),
        ),
        record("FP8", identity={"forward": "vllm"}, against_reference=diverging("BF16", kld, 0.00001)),
        record("Q4", identity={"forward": "gguf"}, against_reference=diverging("BF16", 0.04, 0.001)),
    ]  # fmt: skip


def test_known_and_unknown_floors_are_said() -> None:
    first, second = floor_lines(run(0.05))
    assert (
        first
        == "floor of vllm: KLD 0.000310 ± 0.000020, BF16 vLLM against BF16: values at or below it say nothing"
    )
    assert second == "floor of gguf is unknown: no unquantized model ran in it"
    assert floor_lines([record("BF16"), record("Q4")]) == []


def test_the_references_own_engine_says_how_to_measure_it() -> None:
    models = run(0.05)
    own = models[2].model_copy(update={"identity": {"forward": "hf"}})
    assert "--noise-floor" in floor_lines([models[0], own])[0]
    noise = models[1].model_copy(
        update={"label": "BF16 noise floor", "identity": {"forward": "hf", "options": {"layer_noise": 0.002}}}
    )
    (line,) = floor_lines([models[0], own, noise])
    assert line.startswith("floor of hf: KLD 0.000310 ± 0.000020, BF16 with every layer's output times")


def test_a_quantized_reference_has_no_null_control() -> None:
    models = [
        model.model_copy(update={"against_reference": against.model_copy(update={"quantized": True})})
        for model in run(0.05)
        if (against := model.against_reference) is not None
    ]
    assert floor_lines(models) == ["floor of vllm, gguf is unknown: the reference, BF16, is itself quantized"]


def test_a_value_at_the_floor_is_marked_in_every_table() -> None:
    for kld, marked in ((0.0003, True), (0.0004, False)):
        records = run(kld)
        for text in (
            terminal(lambda console, r=records: table.print_table(r, console, True), 200),
            table.markdown(records, kld=True),
        ):
            (row,) = (
                line for line in text.splitlines() if line.strip("| ").startswith("FP8 ") and "±" in line
            )
            assert ("floor" in row) == marked and f"{kld:.6f} ± 0.000010" in row
            assert "floor of vllm: KLD 0.000310" in text and "floor of gguf is unknown" in text
    without = terminal(lambda console: table.print_table(run(0.0003), console), 200)
    assert "floor" not in without.replace("noise floor", "")


def test_the_label_of_a_control_is_shown_and_not_obeyed() -> None:
    text = terminal(lambda console: table.print_table(run(0.05, EVIL), console, True), 80)
    assert "\x1b" not in text and "\\x1b[2J" in text


def test_csv_and_json_carry_the_floor() -> None:
    records = with_floors(run(0.05))
    rows = {row["label"]: row for row in csv.DictReader(table.as_csv(records).splitlines())}
    assert (rows["FP8"]["kld_floor"], rows["FP8"]["kld_floor_label"]) == ("0.00031", "BF16 vLLM")
    assert rows["Q4"]["kld_floor"] == rows["BF16"]["kld_floor"] == ""
    found = {one["label"]: one["against_reference"] for one in json.loads(table.as_json(records))}
    assert found["FP8"]["floor"]["kld"]["value"] == 0.00031 and found["FP8"]["floor"]["engine"] == "vllm"
    assert found["Q4"]["floor"] is None and found["BF16"] is None


def test_small_divergences_keep_three_digits() -> None:
    shown = terminal(lambda console: table.print_table(run(0.0000678), console, True), 200)
    assert "0.0000678 ± 0.0000100" in shown and "0.04000 ± 0.00100" in shown
