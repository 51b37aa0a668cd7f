"""Which model the others are compared with: by hand, by rule, and where it failed."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tiny
from conftest import Runs

from evalq.checkpoint.provenance import PROVENANCE_FILE, Provenance, Step, write_provenance
from evalq.errors import SpecError
from evalq.results.reference import Candidate, Reference, choose

FULL, HALF, Q8, Q4 = (
    Candidate("F32", 32.0),
    Candidate("BF16", 16.0),
    Candidate("Q8", 8.5),
    Candidate("Q4", 4.5),
)
UNPACKED = Candidate("Q4 dequantized", 16.0, derived=True)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([Q4, HALF, Q8], Reference("BF16", False, False)),
        ([Q4, HALF, FULL], Reference("F32", False, False)),
        ([HALF, Candidate("F16", 16.0)], Reference("BF16", False, False)),
        ([Q4, Q8], Reference("Q8", True, False)),
        ([Q4, UNPACKED, Q8], Reference("Q8", True, False)),
        ([UNPACKED, HALF, Q4], Reference("BF16", False, False)),
        ([UNPACKED, Candidate("merged", 16.0, derived=True)], Reference("Q4 dequantized", True, False)),
        ([HALF], None),
        ([HALF, Candidate("gone", None)], None),
        ([], None),
    ],
)
def test_the_rule(models: list[Candidate], expected: Reference | None) -> None:
    assert choose(models) == expected


def test_by_hand_goes_before_the_rule() -> None:
    marked = [HALF, Candidate("old", 8.5, marked=1), Candidate("new", 4.5, marked=2)]
    assert choose(marked) == Reference("new", True, True)
    assert choose(marked[:2]) == Reference("old", True, True)
    assert choose(marked, "BF16") == Reference("BF16", False, True)
    with pytest.raises(SpecError, match='did you mean "BF16"'):
        choose(marked, "BF61")


def model(label: str, bits: float, **more: Any) -> dict[str, Any]:
    return {"label": label, "override_bpw_layer": bits, "options": {"seed": len(label)}} | more


def against(records: list[dict[str, Any]]) -> dict[str, str | None]:
    return {r["label"]: (r["against_reference"] or {}).get("label") for r in records}


def test_the_flag_the_key_and_the_old_key(runs: Runs) -> None:
    models = runs.models(model("Aa", 16.0), model("Bbb", 8.0), model("Cccc", 4.0, out_logits="x"))
    _, found = runs.compare(runs.data(), models)
    assert against(found) == {"Aa": "Cccc", "Bbb": "Cccc", "Cccc": None}
    assert found[0]["against_reference"]["quantized"] is True and found[2]["is_reference"]
    models = runs.models(
        model("Aa", 16.0), model("Bbb", 8.0, reference=True), model("Cccc", 4.0, out_logits="x")
    )
    _, found = runs.compare(runs.data(), models)
    assert against(found) == {"Aa": "Bbb", "Bbb": None, "Cccc": "Bbb"}
    _, found = runs.compare(runs.data(), models, more=("--reference", "Aa"))
    assert against(found) == {"Aa": None, "Bbb": "Aa", "Cccc": "Aa"}
    assert found[1]["against_reference"]["quantized"] is False


def test_a_label_that_is_not_there_ends_the_run_before_it_begins(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = runs.compare(runs.data(), runs.models({}), more=("--reference", "nobody"))
    assert code == 2 and not records and 'no model has the label "nobody"' in capsys.readouterr().err


def test_a_reference_that_failed_is_told(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"options": {"misbehave": "oom-load"}}
    models = runs.models(model("Aa", 16.0) | broken, model("Bbb", 8.0), model("Cccc", 4.0))
    code, found = runs.compare(runs.data(), models)
    assert code == 1 and against(found) == {"Aa": None, "Bbb": None, "Cccc": "Bbb"}
    assert 'the reference "Aa" was not scored: another one takes its place' in capsys.readouterr().err
    models = runs.models(
        model("Aa", 16.0) | broken | {"reference": True}, model("Bbb", 8.0), model("Cccc", 4.0)
    )
    _, found = runs.compare(runs.data(), models)
    assert against(found) == {"Aa": None, "Bbb": None, "Cccc": None}
    assert 'the reference "Aa" was not scored' in capsys.readouterr().err


def test_models_with_other_tokens_missing_are_shown_without_a_comparison(runs: Runs) -> None:
    """Each loses under 1% of its tokens; together they lose more, so their difference means nothing."""
    data = runs.data(eval_len=103, eval_stride=103, max_rows=20)
    some = {"misbehave": "some-nan", "batch_windows": 1}
    models = runs.models(
        model("Aa", 16.0, options=some | {"seed": 1}), model("Bbb", 8.0, options=some | {"seed": 2})
    )
    code, (first, second) = runs.compare(data, models)
    assert code == 0 and first["tokens_nonfinite"] == second["tokens_nonfinite"] == 20
    # At the same places here, so the pair is still under the limit.
    assert second["against_reference"]["label"] == "Aa"


def test_a_model_beyond_float_is_shown_beside_the_reference(runs: Runs) -> None:
    models = runs.models(model("Aa", 16.0, options={"mode": "oracle"}), model("Bbb", 8.0))
    code, (_, bad) = runs.compare(runs.data(protocol="lm-eval", eval_stride=None, max_rows=1), models)
    assert code == 0 and bad["against_reference"]["ppl_ratio"] > 1


def test_lm_eval_on_the_first_tokens_of_a_text(runs: Runs) -> None:
    data = runs.data(protocol="lm-eval", eval_stride=None, max_rows=None, max_tokens=700)
    code, (record,) = runs.compare(data, runs.models({}))
    assert code == 0 and record["ppl"] is not None and record["word_ppl"] is None


def test_a_converted_checkpoint_is_no_reference_by_rule(runs: Runs, tmp_path: Path) -> None:
    """Its files look like an unquantized model's, but for what `evalq dequantize` wrote beside them."""
    converted = make_tiny(tmp_path / "converted", seed=1)
    step = Step("dequantize", "int4", "0" * 64, "INT4", 7, "bfloat16", None, None, 0, "0.1.0")
    write_provenance(converted, Provenance((step,)))
    models = runs.models({"label": "Plain", "model_dir": str(converted)}, {"label": "Original"})
    _, found = runs.compare(runs.data(), models)
    assert against(found) == {"Plain": "Original", "Original": None}
    (converted / PROVENANCE_FILE).unlink()
    _, found = runs.compare(runs.data(), models)
    assert against(found) == {"Plain": None, "Original": "Plain"}
