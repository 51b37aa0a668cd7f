"""The tokenizer's worker: chat templates are programs of strangers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Runs

from evalq.errors import ModelError
from evalq.run import tokenizing
from evalq.run.job import DecodeJob, DecodePiece, from_line, to_line

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a == b + 1000000 %}x{% endif %}{% endfor %}"
)
ENDLESS += "{% endfor %}"


def test_what_takes_longer_than_the_limit_is_stopped_and_what_does_not_is_left_alone() -> None:
    with pytest.raises(ModelError, match='longer than 1 s.*"chat_template" to false') as caught:
        with tokenizing._time_limit(1, 'set "chat_template" to false'):
            while True:
                pass
    assert caught.value.category == "timeout"
    with tokenizing._time_limit(5, ""):
        found = 7
    assert found == 7


def test_a_limit_is_not_caught_by_who_tries_one_template_after_another() -> None:
    tries = 0
    with pytest.raises(ModelError), tokenizing._time_limit(1, ""):
        for _ in range(2):
            tries += 1
            try:
                while True:
                    pass
            except Exception:
                continue
    assert tries == 1


@pytest.mark.engine
def test_a_template_without_an_end_ends_the_run_in_one_line(
    runs: Runs,
    smollm2: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = runs.folder / "hostile"
    folder.mkdir()
    for file in smollm2("bf16").iterdir():
        if file.name.startswith(("tokenizer", "config", "special")):
            shutil.copy(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": ENDLESS}))
    (folder / "chat_template.jinja").write_text(ENDLESS)
    data = runs.data(tokenize_fn="hf", tokenizer_dir=str(folder), chat_template=True)
    code, records = runs.compare(data, runs.models({}))
    assert code == 2 and not records
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the chat template took longer than 10 s" in last and "Traceback" not in last


def test_tokens_continue_what_stands_before_them() -> None:
    events: list[tuple[str, dict[str, object]]] = []
    pieces = (
        DecodePiece(before=tuple(b"Hello "), tokens=(ord("w"), 300, -1)),
        DecodePiece(before=tuple("naï".encode()[:-1]), tokens=("ï".encode()[1],)),
        DecodePiece(before=(), tokens=(ord("x"),)),
    )
    job = DecodeJob(backend="fake", path="nowhere", pieces=pieces)
    tokenizing.decode(job, lambda event, **fields: events.append((event, fields)))
    told = [fields for event, fields in events if event == "decoded"]
    assert told[0] == {"before": "Hello ", "tokens": ["w", "<300>", "<-1>"]}
    assert told[1]["before"] == "na\ufffd" and told[1]["tokens"] == ["\ufffd"]
    assert told[2] == {"before": "", "tokens": ["x"]}
    assert from_line(to_line(job)) == job
