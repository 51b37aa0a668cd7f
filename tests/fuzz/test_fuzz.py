"""A short run of every fuzzing target; `make fuzz` is the long one."""

import pytest
from fuzz.harness import fuzz, target_files

INPUTS = 150


@pytest.mark.parametrize("name", target_files())
def test_broken_inputs_end_in_one_line(name: str) -> None:
    outcome = fuzz(name, INPUTS)
    assert not outcome.findings, outcome.summary()
    assert outcome.inputs == INPUTS
    assert outcome.ended, "every input was refused, the whole ones too: the target reads nothing"
    assert outcome.refused, "no input was refused: they are not broken enough"
