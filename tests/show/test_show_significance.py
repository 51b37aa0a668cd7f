"""Verdicts, matrices and resolutions as people see them."""

import json
import re

import numpy as np
import pytest
from result_records import against, failed, record, terminal

from evalq.results.estimate import Estimate
from evalq.results.record import AgainstReference, ResultRecord
from evalq.results.resolution import Resolution
from evalq.results.significance import Scored, matrices
from evalq.show import table
from evalq.show.significance import print_matrices, resolution_lines

N = 2000
CLUSTER_OF = np.arange(N, dtype=np.int64) // 100


def scored(*labels: str) -> list[Scored]:
    """Each 5% worse than the one before it."""
    rng = np.random.default_rng(0)
    ln_p = -rng.gamma(1, 2, N)
    return [
        Scored(label, {"logprob": ln_p - i * np.log(1.05) + rng.normal(0, 0.01, N)})
        for i, label in enumerate(labels)
    ]


def test_a_matrix_has_a_row_and_a_column_a_model() -> None:
    found = matrices(scored("BF16", "INT8", "INT4"), CLUSTER_OF)
    out = terminal(lambda console: print_matrices(found, console), 80)
    header, *rows = [
        re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if re.match(r"model|\d ", line)
    ]
    assert header == ["model", "1", "2", "3"]
    assert [row[0] for row in rows] == ["1 BF16", "2 INT8", "3 INT4"]
    cells = [[float(cell.rstrip("*")) if cell != "·" else None for cell in row[1:]] for row in rows]
    assert cells[0][0] is cells[1][1] is cells[2][2] is None
    assert cells[1][0] == pytest.approx(5, abs=0.1) and cells[2][0] == pytest.approx(10.25, abs=0.1)
    assert cells[0][1] == pytest.approx(-4.76, abs=0.1)
    assert out.count("*") == 6 + 1 and "all 3 pairs" in out


def test_models_alike_have_no_star_and_one_model_has_no_matrix() -> None:
    one = scored("A")[0]
    out = terminal(
        lambda console: print_matrices(matrices([one, Scored("B", one.columns)], CLUSTER_OF), console), 80
    )
    assert "0.00*" not in out and "for all 1 pair together" in out
    assert "nothing to compare" in terminal(lambda console: print_matrices([], console), 80)


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_a_matrix_of_many_models_fits_the_terminal(columns: int) -> None:
    labels = [f"model {i} \x1b[2J" for i in range(14)]
    out = terminal(lambda console: print_matrices(matrices(scored(*labels), CLUSTER_OF), console), columns)
    rows = [line for line in out.splitlines() if re.match(r"\d+ model", line)]
    assert len(rows) == 14 and all(len(line) <= columns for line in rows)
    assert "\x1b" not in out and ("no room for: " in out) == (columns < 160)


def compared(low: float, high: float, **more: Estimate) -> AgainstReference:
    metrics = {"ln_ratio": Estimate(value=(low + high) / 2, stderr=(high - low) / 4, low=low, high=high)}
    return AgainstReference(label="BF16", metrics=metrics | more)


def shown(records: list[ResultRecord]) -> tuple[str, str]:
    return terminal(lambda console: table.print_table(records, console), 80), table.markdown(records)


def test_every_model_has_its_verdict_under_the_table() -> None:
    records = [
        record("BF16"),
        record("INT4", against_reference=compared(0.01, 0.02)),
        record("INT8", against_reference=compared(-0.01, 0.02)),
        record("ruin", against_reference=compared(2.0, 2.5)),
        failed("gone"),
    ]
    for text in shown(records):
        assert "INT4: worse by 1.0 to 2.0 %" in text
        assert "INT8: no difference shown (1.0 % better to 2.0 % worse)" in text
        assert "ruin: broken: " in text and "broken: surely more than 1 nat per token" in text
        assert "95% interval" in text and "  BF16: " not in text and "gone: worse" not in text
    for text in shown(records[:3]):
        assert "broken" not in text
    for text in shown(records[:1]):
        assert "verdict" not in text


KLD = {
    "kld": Estimate(value=0.01234, stderr=0.00056, low=0.0112, high=0.0136),
    "kld_p99_9": Estimate(value=1.234, stderr=0.1, low=1.1, high=1.5),
    "same_top": Estimate(value=0.9512, stderr=0.0012, low=0.948, high=0.953),
    "acceptance": Estimate(value=0.97, stderr=0.001, low=0.968, high=0.972),
}


def test_divergence_is_shown_where_it_is_asked_for() -> None:
    records = [record("BF16"), record("INT4", against_reference=compared(0.01, 0.02, **KLD))]
    values = ("0.01234 ± 0.00056", "1.234 ± 0.100", "95.12 ± 0.12 %", "97.00 ± 0.10 %")
    for kld in (False, True):
        wide = terminal(lambda console, kld=kld: table.print_table(records, console, kld), 200)  # type: ignore[misc]
        for text in (wide, table.markdown(records, kld)):
            assert all((value in text) == kld for value in values)
            assert ("KLD 99.9 %" in text) == kld
    assert "0.01234 ± 0.00056" in terminal(lambda console: table.print_table(records, console, True), 80)


def test_exact_and_bound_stand_in_columns_of_their_own() -> None:
    bound = {"kld_bound": Estimate(value=0.005, stderr=0.001, low=0.004, high=0.006)}
    records = [
        record("BF16"),
        record("INT4", against_reference=compared(0.01, 0.02, **KLD)),
        record("served", against_reference=compared(0.01, 0.02, **bound)),
    ]
    header, _, _, exact, other = table.markdown(records, kld=True).splitlines()[:5]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, exact, other)]
    at = {name: cells[0].index(name) for name in ("KLD", "KLD bound")}
    assert cells[1][at["KLD"]].startswith("0.01234") and cells[1][at["KLD bound"]] == ""
    assert cells[2][at["KLD bound"]].startswith("0.00500") and cells[2][at["KLD"]] == ""


def test_json_and_csv_hold_everything_in_any_case() -> None:
    records = [record("BF16"), record("INT4", against_reference=compared(0.01, 0.02, **KLD))]
    header, _, line = table.as_csv(records).splitlines()
    row = dict(zip(header.split(","), line.split(","), strict=True))
    assert (row["kld"], row["kld_stderr"], row["kld_low"], row["kld_high"]) == (
        "0.01234", "0.00056", "0.0112", "0.0136",
    )  # fmt: skip
    assert row["verdict"] == "worse by 1.0 to 2.0 %"
    first, second = json.loads(table.as_json(records))
    assert (first["verdict"], second["verdict"]) == (None, "worse by 1.0 to 2.0 %")
    assert second["against_reference"]["metrics"]["kld_p99_9"]["high"] == 1.5
    assert [ResultRecord.model_validate(one) for one in (first, second)] == records


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Resolution(20, 0.0068, 0.005, 37, 0.3), "± 0.5 % takes about 37 windows; 20 windows give ± 0.68 %"),
        (
            Resolution(20, 0.001, 0.005, 4, 0.3),
            "± 0.5 % takes about 4 windows (there already); 20 windows give ± 0.1 %",
        ),
        (
            Resolution(2, 9.0, 1e-9, None, 1.0),
            "± 1e-07 % takes more windows than any text has; 2 windows give ± 900 %",
        ),
        (None, "the windows tell no error yet, two that do not overlap are needed"),
    ],
)  # fmt: skip
def test_windows_that_a_resolution_takes(found: Resolution | None, said: str) -> None:
    assert list(resolution_lines([("INT4", found)])) == [f"INT4: {said}"]


def test_records_of_0_1_have_two_standard_errors_instead_of_an_interval() -> None:
    text, _ = shown([record("BF16"), record("INT4", against_reference=against("BF16", 0.01, 0.002))])
    assert "INT4: worse by 0.60 to 1.41 %" in text


def test_an_error_of_0_1_that_is_a_lower_bound_still_says_so() -> None:
    bound, whole = record("old", ppl_stderr_is_lower_bound=True), record("new")
    out = terminal(lambda console: table.print_table([bound, whole], console), 160)
    assert "≥0.123" in out and out.count("≥") == 1
