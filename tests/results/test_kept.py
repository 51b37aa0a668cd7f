"""A reference's rows in the store."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from window_cases import plan

from evalq.engine.reference import ReferenceHead
from evalq.errors import ModelError, StoreError
from evalq.results import kept
from evalq.results.kept import KeptInputs, KeptReference, plain_columns, stored_name

HEAD = ReferenceHead(kind="logits", dtype="float32", width=10, vocab_size=10)
PLAN = plan("gptq", 40, 10)


def filled(folder: Path) -> KeptReference:
    """All rows of PLAN: row i of window w is w, everywhere."""
    found = KeptReference(folder / "family")
    found.begin(HEAD, PLAN, None)
    for index, window in enumerate(PLAN.windows):
        rows = np.full((window.n_targets, HEAD.row_shape[0]), index, np.uint16)
        found.write(window, rows, np.full(window.n_targets, -index, np.float32))
    return found


def test_rows_are_read_back_window_by_window(tmp_path: Path) -> None:
    reference = filled(tmp_path)
    assert reference.there(PLAN).all() and reference.head() == HEAD
    inputs = KeptInputs(reference, PLAN.windows[1:3])
    inputs.prefetch()
    for _ in range(2):  # ahead of time, and not
        rows = inputs["reference"]
        assert rows.shape == (2, 9, HEAD.row_shape[0]) and (rows[0] == 1).all() and (rows[1] == 2).all()
    assert inputs.logprob()[:, 0].tolist() == [-1, -2]
    assert list(inputs) == ["reference"] and inputs.get("other") is None


def test_more_windows_of_the_same_text_keep_what_is_there(tmp_path: Path) -> None:
    reference = filled(tmp_path)
    longer = plan("gptq", 60, 10)
    assert reference.there(longer).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "other-head", "other-shape"])
def test_what_cannot_be_read_counts_as_not_there(tmp_path: Path, damage: str) -> None:
    reference = filled(tmp_path)
    window = PLAN.windows[2]
    file = next(reference.path.glob(f"{window.start}-*"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "gone":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other-shape":
        reference.write(window, np.zeros((3, 2), np.uint16), np.zeros(3, np.float32))
    else:
        other = KeptReference(tmp_path / "other")
        other.begin(HEAD.model_copy(update={"soft_cap": 3.0}), PLAN, None)
        other.write(window, np.zeros((9, HEAD.row_shape[0]), np.uint16), np.zeros(9, np.float32))
        shutil.copy(next(other.path.glob("20-*")), file)
    assert reference.there(PLAN).tolist() == [True, True, False, True]
    with pytest.raises(ModelError, match="tokens 20 to 30 cannot be read") as caught:
        KeptInputs(reference, (window,))["reference"]
    assert "scored again" in str(caught.value.remedy)


def test_another_head_forgets_the_rows_of_the_one_before(tmp_path: Path) -> None:
    reference = filled(tmp_path)
    reference.begin(HEAD, PLAN, None)
    assert reference.there(PLAN).all()
    reference.begin(HEAD.model_copy(update={"multiplier": 2.0}), PLAN, None)
    assert not reference.there(PLAN).any()


def test_rows_that_would_take_too_much_are_refused_with_their_size(tmp_path: Path) -> None:
    needed = 36 * HEAD.row_bytes
    KeptReference(tmp_path / "fits").begin(HEAD, PLAN, needed)
    with pytest.raises(ModelError, match=r"takes 0\.0 GB") as caught:
        KeptReference(tmp_path / "family").begin(HEAD, PLAN, needed - 1)
    assert "--reference-max-gb" in str(caught.value.remedy)


def test_a_disk_without_room_is_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="are free") as caught:
        KeptReference(tmp_path / "family").begin(HEAD, PLAN, None)
    assert "--store" in str(caught.value.remedy)


def test_columns_beside_a_reference_name_it_in_the_store() -> None:
    assert stored_name("kld", "f" * 64) == "kld@" + "f" * 16
    assert stored_name("logprob", "f" * 64) == "logprob" and stored_name("kld", None) == "kld"
    columns = {"logprob": 1, "kld@" + "a" * 16: 2, "kld@" + "b" * 16: 3}
    assert plain_columns(columns, "a" * 64) == {"logprob": 1, "kld": 2}
    assert plain_columns(columns, "c" * 64) == plain_columns(columns, None) == {"logprob": 1}
