"""The fuzzing harness finds what it is there for, and gives the same inputs again."""

import random
from pathlib import Path

from fuzz.harness import Outcome, fuzz
from fuzz.mutators import mutate_bytes, mutate_json, mutate_text

TARGETS = """
import os, signal, time
from evalq.errors import SpecError
from fuzz.harness import Target

def run(data):
    word = data.decode()
    if word == "refused":
        raise SpecError("no")
    if word == "traceback":
        {}["missing"]
    if word == "exit":
        raise SystemExit(3)
    if word == "memory":
        bytearray(2 * 2**30)
    if word == "busy":
        while True:
            pass
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    print("read")

WORDS = (b"read", b"refused", b"traceback", b"busy", b"memory", b"exit", b"crash", b"read")
TARGETS = (Target("words", lambda: WORDS, run, lambda random, seeds: b"read"),)
"""


def _fuzz(folder: Path, inputs: int) -> Outcome:
    (folder / "targets_words.py").write_text(TARGETS)
    return fuzz("words", inputs, folder=folder, cpu_seconds=0.5)


def test_every_kind_of_finding(tmp_path: Path) -> None:
    outcome = _fuzz(tmp_path, 10)
    assert [(found.number, found.kind) for found in outcome.findings] == [
        (2, "traceback"),
        (3, "hang"),
        (4, "over memory"),
        (5, "traceback"),
        (6, "traceback"),
    ]
    assert (outcome.ended, outcome.refused, outcome.inputs) == (4, 1, 10)
    assert "KeyError" in outcome.findings[0].where
    assert outcome.findings[4].where == "SIGSEGV"
    assert "1 x hang" in outcome.summary()


def test_mutations_repeat_and_differ() -> None:
    seeds = [b'{"a": [1, 2, {"b": "text 3"}], "c": 4.5}\nINFO 11-21 took 5 s', b'{"d": 6}']
    for mutate, inputs in (
        (mutate_bytes, seeds),
        (mutate_text, seeds),
        (mutate_json, [b'{"a": [1, {"b": 2}]}']),
    ):
        first = [mutate(random.Random(f"{i}"), inputs) for i in range(60)]
        assert first == [mutate(random.Random(f"{i}"), inputs) for i in range(60)]
        assert len(set(first)) > 40
        assert max(map(len, first)) < 5_000_000
