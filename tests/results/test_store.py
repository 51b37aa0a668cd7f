"""The store on its own: atomic, locked, tolerant of what a crash leaves behind."""

import threading
from pathlib import Path

import numpy as np
import pytest

from evalq.errors import StoreError
from evalq.files import read_json, write_atomic, write_json
from evalq.results.store import ResultDir, Store, key_of


def part(result: ResultDir, *windows: int, seconds: float = 1.0) -> None:
    logprob = -np.arange(3, dtype=np.float32)[None] - np.asarray(windows, np.float32)[:, None]
    result.write_part(list(windows), logprob, logprob > -1, seconds)


def test_parts_come_back_in_window_order(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "r")
    part(result, 2, 3)
    part(result, 0, seconds=0.5)
    scores = result.parts()
    assert scores.window.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert scores.logprob[:4].tolist() == [0, -1, -2, -2] and scores.seconds == 1.5
    assert scores.top1.tolist() == [True] + [False] * 8
    assert result.scores() is None


def test_finish_joins_and_cleans_up(tmp_path: Path) -> None:
    result = ResultDir(tmp_path / "r")
    part(result, 0)
    write_json(result.path / "failure.json", {})
    before = result.parts()
    result.finish({"device": "cpu"})
    after = result.scores()
    assert after is not None and np.array_equal(after.logprob, before.logprob) and after.seconds == 1.0
    assert sorted(file.name for file in result.path.iterdir()) == ["run.json", "scores.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_broken_part_counts_as_not_there(tmp_path: Path, keep: int) -> None:
    result = ResultDir(tmp_path / "r")
    part(result, 0)
    part(result, 1)
    broken = result.path / "parts" / "000001.safetensors"
    broken.write_bytes(broken.read_bytes()[:keep])
    assert set(result.parts().window.tolist()) == {0}
    (result.path / "scores.safetensors").write_bytes(b"half")
    assert result.scores() is None


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
    result, waited, order = ResultDir(tmp_path / "r"), threading.Event(), []

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
