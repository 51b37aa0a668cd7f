"""The digest of a model's files: what changes it, what does not, and the cache that must never lie."""

import hashlib
import json
import os
import stat
import threading
import time

import pytest

from evalq.checkpoint import fingerprint as module
from evalq.checkpoint.fingerprint import WHOLE_BYTES_MAX, fingerprint
from evalq.errors import ModelError

SETTLE = 0.15  # longer than the time during which a changed file is not remembered


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for name, content in (("a.safetensors", b"a" * 1000), ("config.json", b"{}"), ("sub/code.py", b"x = 1")):
        (directory / name).write_bytes(content)
    return directory


def files_of(directory):
    return [p for p in directory.rglob("*") if p.is_file()]


def test_digest_is_the_documented_one(model):
    found = fingerprint(files_of(model), None)
    entries = [
        (p.relative_to(model).as_posix(), p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in files_of(model)
    ]
    assert found.digest == hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
    assert found.files == (("a.safetensors", 1000), ("config.json", 2), ("sub/code.py", 5))


def test_order_place_and_links_change_nothing(model, tmp_path):
    before = fingerprint(files_of(model), None)
    assert fingerprint(files_of(model)[::-1], None) == before
    moved = model.rename(tmp_path / "elsewhere")
    assert fingerprint(files_of(moved), None) == before
    linked = tmp_path / "snapshot"
    (linked / "sub").mkdir(parents=True)
    for file in files_of(moved):
        (linked / file.relative_to(moved)).symlink_to(file)
    assert fingerprint(files_of(linked), None) == before


def test_name_content_and_number_of_files_change_it(model):
    digests = {fingerprint(files_of(model), None).digest}
    (model / "a.safetensors").write_bytes(b"a" * 999 + b"b")
    digests.add(fingerprint(files_of(model), None).digest)
    (model / "config.json").rename(model / "config2.json")
    digests.add(fingerprint(files_of(model), None).digest)
    (model / "config2.json").unlink()
    digests.add(fingerprint(files_of(model), None).digest)
    assert len(digests) == 4


def test_the_cache_spares_reading(model, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "digests.json"
    time.sleep(SETTLE)
    before = fingerprint(files_of(model), cache)
    assert len(json.loads(cache.read_text())) == 3
    monkeypatch.setattr(module, "_extents", None)  # hashing anything now fails
    assert fingerprint(files_of(model), cache) == before
    with pytest.raises(TypeError):
        fingerprint(files_of(model), None)


def test_a_replaced_file_is_noticed_though_size_and_mtime_are_the_same(model, tmp_path):
    cache, file = tmp_path / "digests.json", model / "a.safetensors"
    time.sleep(SETTLE)
    before = fingerprint(files_of(model), cache)
    old = file.stat()
    with file.open("r+b") as stream:  # in place: the inode stays, too
        stream.write(b"b" * 1000)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    new = file.stat()
    assert (new.st_size, new.st_mtime_ns, new.st_ino) == (old.st_size, old.st_mtime_ns, old.st_ino)
    after = fingerprint(files_of(model), cache)
    assert after.digest != before.digest
    assert after == fingerprint(files_of(model), None)


def test_a_file_that_just_changed_is_not_remembered(model, tmp_path):
    cache, file = tmp_path / "digests.json", model / "a.safetensors"
    for i in range(20):  # faster than the clock of file times ticks
        file.write_bytes(bytes([i]) * 1000)
        assert fingerprint([file], cache) == fingerprint([file], None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"x": 1}', b"[" * 100_000, b'{"x": [1, 2, 3, 4, "zz"]}']
)
def test_a_broken_cache_is_ignored_and_mended(model, tmp_path, content):
    cache = tmp_path / "digests.json"
    cache.write_bytes(content)
    time.sleep(SETTLE)
    assert fingerprint(files_of(model), cache) == fingerprint(files_of(model), None)
    assert set(json.loads(cache.read_text())) == {os.path.realpath(f) for f in files_of(model)}


def test_a_cache_that_cannot_be_written_costs_nothing(model, tmp_path):
    expected = fingerprint(files_of(model), None)
    time.sleep(SETTLE)
    (tmp_path / "file").write_bytes(b"")
    assert (
        fingerprint(files_of(model), tmp_path / "file" / "digests.json") == expected
    )  # parent is no directory
    (tmp_path / "folder").mkdir()
    assert fingerprint(files_of(model), tmp_path / "folder") == expected  # is a directory
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert fingerprint(files_of(model), locked / "digests.json") == expected
    locked.chmod(stat.S_IRWXU)
    assert not list(tmp_path.glob(".folder.*"))


def test_writers_at_once_keep_each_others_entries(tmp_path):
    cache = tmp_path / "digests.json"
    files = [tmp_path / f"{i}.bin" for i in range(16)]
    for file in files:
        file.write_bytes(file.name.encode())
    time.sleep(SETTLE)
    threads = [threading.Thread(target=fingerprint, args=([file], cache)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads(cache.read_text())) == {os.path.realpath(f) for f in files}


def test_large_files_are_sampled(tmp_path):
    """A sparse file above 1 GiB: the header, the end and every sampled block count."""
    file = tmp_path / "large.safetensors"
    size = WHOLE_BYTES_MAX + 64 * 2**20 + 5
    with file.open("wb") as stream:
        stream.truncate(size)
    before = fingerprint([file], None)
    digests = {before.digest}
    last = size - 64 * 2**10
    sampled = 16 * 2**20 + (last - 16 * 2**20) * 100 // 256
    for offset in (0, 16 * 2**20 - 1, sampled, size - 1):
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"x")
        digests.add(fingerprint([file], None).digest)
    assert len(digests) == 5
    with file.open("r+b") as stream:
        stream.truncate(size + 1)
    assert fingerprint([file], None).digest not in digests


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="gone.safetensors: no such file") as error:
        fingerprint([tmp_path / "gone.safetensors"], None)
    assert error.value.category == "model_missing"
