"""The store on its own: atomic, locked, tolerant of what a crash leaves behind."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from evalq.data.windows import Window, WindowPlan
from evalq.errors import StoreError
from evalq.files import read_json, write_atomic, write_json
from evalq.results.reference import clusters_of
from evalq.results.store import ResultDir, Store, key_of
from evalq.results.tokens import Part, Timing

PLAN = WindowPlan("gptq", tuple(Window(4 * i, 4 * i + 4, 4 * i + 1) for i in range(4)), ())
OTHER = WindowPlan("gptq", tuple(Window(4 * i, 4 * i + 4, 4 * i) for i in range(4)), (7,))


def part(
    result: ResultDir, *windows: int, seconds: float = 1.0, plan: WindowPlan = PLAN, **more: Any
) -> None:
    logprob = -np.arange(3, dtype=np.float32)[None] - np.asarray(windows, np.float32)[:, None]
    columns = {"logprob": logprob, "top1": logprob > -1} | more
    timing = Timing(seconds, logprob.size, "{}")
    result.write_part(Part(windows, columns, timing), plan)


def columns_of(result: ResultDir) -> dict[str, Any]:
    found = result.scores()
    assert found is not None
    return dict(found.columns)


def test_parts_come_back_in_window_order(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 2, 3)
    part(result, 0, seconds=0.5)
    held = result.held(PLAN)
    assert held.missing(["logprob"]) == {1: ("logprob",)} and not held.complete
    assert held.columns["logprob"][:3].tolist() == [0, -1, -2] and held.timing.seconds == 1.5
    assert held.columns["logprob"][6:].tolist() == [-2, -3, -4, -3, -4, -5]
    assert held.columns["top1"].tolist() == [True] + [False] * 11
    assert result.scores() is None


def test_finish_joins_and_cleans_up(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    for window in range(4):
        part(result, window)
    write_json(result.path / "failure.json", {})
    held = result.held(PLAN)
    result.finish(held, {"device": "cpu"})
    after = result.scores()
    assert after is not None and after.belongs_to(PLAN) and after.timing == Timing(4.0, 12, "{}")
    assert np.array_equal(after.columns["logprob"], held.complete["logprob"])
    assert after.columns["top1"].dtype == bool
    assert sorted(file.name for file in result.path.iterdir()) == ["run.json", "scores.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_broken_part_counts_as_not_there(tmp_path: Path, keep: int) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0)
    part(result, 1)
    (broken,) = (result.path / "parts").glob("000001-*")
    broken.write_bytes(broken.read_bytes()[:keep])
    assert list(result.held(PLAN).missing(["logprob"])) == [1, 2, 3]
    (result.path / "scores.safetensors").write_bytes(b"half")
    assert result.scores() is None and result.windows_done() == 1


def test_parts_of_other_windows_are_not_taken(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3)
    assert list(result.held(OTHER).missing(["logprob"])) == [0, 1, 2, 3]
    result.finish(result.held(PLAN), {})
    assert result.answers(PLAN, ["logprob"]) and not result.answers(OTHER, ["logprob"])


def test_a_column_that_is_missing_is_asked_for_alone(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3)
    result.finish(result.held(PLAN), {})
    before = columns_of(result)["logprob"]
    assert not result.answers(PLAN, ["logprob", "entropy"])
    assert result.held(PLAN).missing(["logprob", "entropy"]) == {i: ("entropy",) for i in range(4)}
    entropy = np.arange(12, dtype=np.float32).reshape(4, 3)
    result.write_part(Part((0, 1, 2, 3), {"entropy": entropy}, Timing(1.0, 12, "{}")), PLAN)
    result.finish(result.held(PLAN), {})
    assert result.answers(PLAN, ["logprob", "top1", "entropy"])
    after = columns_of(result)
    assert np.array_equal(after["logprob"], before) and after["entropy"].tolist() == list(range(12))


def test_a_column_that_the_engine_cannot_give_is_not_asked_for_again(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3)
    result.finish(result.held(PLAN), {"columns_not_given": ["entropy"]})
    assert result.answers(PLAN, ["logprob", "entropy"]) and not result.answers(PLAN, ["logprob", "other"])


def rewritten(file: Path, **changes: Any) -> None:
    """A file whose tensors are replaced (None: left out)."""
    with safe_open(file, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    metadata |= changes.pop("metadata", {})
    tensors |= changes
    save_file({name: value for name, value in tensors.items() if value is not None}, file, metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": None},
        {"window": np.zeros(12, np.float32)},
        {"window": np.zeros((3, 4), np.int64)},
        {"window": np.arange(5)},
        {"logprob": np.zeros(11, np.float32)},
        {"logprob": np.zeros((12, 1), np.float32)},
        {"windows": np.zeros((4, 3), np.int64)},
        {"metadata": {"seconds": "nan"}},
        {"metadata": {"seconds": "soon"}},
        {"metadata": {"tokens": "-1"}},
        {"metadata": {"bool": "["}},
        {"metadata": {"bool": "7"}},
        {"metadata": {"plan": "another"}},
    ],
)
def test_a_file_that_contradicts_itself_or_the_plan_is_no_result(tmp_path: Path, changes: Any) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3)
    result.finish(result.held(PLAN), {})
    rewritten(result.path / "scores.safetensors", **changes)
    assert not result.answers(PLAN, ["logprob"])
    assert list(result.held(PLAN).missing(["logprob"])) == [0, 1, 2, 3]


def test_a_result_removed_under_a_writer_is_made_again(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0)
    result.clear()
    part(result, 1)
    assert list(result.held(PLAN).missing(["logprob"])) == [0, 2, 3]
    assert not list(tmp_path.glob(".removed-*"))


def test_parts_beside_a_finished_result_are_tidied_unless_somebody_writes(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3)
    result.finish(result.held(PLAN), {})
    part(result, 0)
    held, release = threading.Event(), threading.Event()

    def writer() -> None:
        with ResultDir(result.path).lock():
            held.set()
            release.wait(10)

    thread = threading.Thread(target=writer)
    thread.start()
    assert held.wait(10)
    result.tidy()
    assert (result.path / "parts").exists()
    release.set()
    thread.join()
    result.tidy()
    assert not (result.path / "parts").exists()


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    part(store.result("k"), 0)
    write_json(store.result("k").path / "identity.json", {})
    before = sorted(tmp_path.rglob("*"))
    assert [r.path.name for r in Store(tmp_path / "s", read_only=True).results()] == ["k"]
    assert Store(tmp_path / "nowhere", read_only=True).results() == []
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "f"
    write_atomic(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left.*free some space"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    result, waited, order = ResultDir(tmp_path / "results" / "r"), threading.Event(), []

    def second() -> None:
        with ResultDir(result.path).lock(on_wait=waited.set):
            order.append("second")

    with result.lock():
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(10)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_clear_removes_one_result(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for key in ("a", "b"):
        part(store.result(key), 0)
        write_json(store.result(key).path / "identity.json", {})
    store.result("a").clear()
    store.result("never there").clear()
    assert [result.path.name for result in store.results()] == ["b"]


def test_key_depends_on_every_field_and_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": "1"}), key_of({"b": 1}), key_of({})}) == 5


def test_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="cannot be written.*--store"):
        Store(tmp_path / "f")


def test_broken_json_reads_as_missing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"half": ')
    assert read_json(tmp_path / "x.json") is None and read_json(tmp_path / "none.json") is None


def test_figures_see_the_tokens_that_count_and_the_store_keeps_every_target(tmp_path: Path) -> None:
    mask = np.array([True, False, True] + [False, True, True] * 3)
    plan = WindowPlan("chat", PLAN.windows, (), mask)
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3, plan=plan)
    result.finish(result.held(plan), {})
    found, every = result.scores(), result.every_target()
    assert found is not None and every is not None
    assert found.belongs_to(plan) and every.belongs_to(plan) and not every.belongs_to(PLAN)
    assert result.answers(plan, ["logprob"])
    assert every.columns["logprob"].size == 12 and found.columns["logprob"].size == 8
    assert np.array_equal(found.columns["logprob"], every.columns["logprob"][mask])
    assert np.array_equal(found.window_of, plan.window_of[mask])
    assert np.array_equal(clusters_of(found, "chat"), plan.cluster_of)
    assert not result.held(plan).missing(["logprob"]), "a plan without a mask shares its windows' scores"


def test_a_mask_that_contradicts_the_windows_makes_a_file_unreadable(tmp_path: Path) -> None:
    plan = WindowPlan("chat", PLAN.windows, (), np.arange(12) % 2 == 0)
    result = ResultDir(tmp_path / "results" / "r")
    part(result, 0, 1, 2, 3, plan=plan)
    result.finish(result.held(plan), {})
    file = result.path / "scores.safetensors"
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors | {"mask": tensors["mask"][:-1]}, file, metadata)
    assert result.scores() is None
    save_file(tensors | {"windows": tensors["windows"][:-1]}, file, metadata)
    assert result.scores() is None
