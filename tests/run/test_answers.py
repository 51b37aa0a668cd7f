"""The reference's own answers as a text: generated once, kept, scored by all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_tiny
from conftest import Runs

from evalq.results.store import Store
from evalq.run.answers import AT_ONCE


def prompts(runs: Runs, *questions: str) -> str:
    lines = [json.dumps({"messages": [{"role": "user", "content": one}]}) for one in questions]
    return str(runs.write("prompts.jsonl", "\n".join(lines)))


def answers_data(runs: Runs, *questions: str, **generate: Any) -> Path:
    defaults = {"eval_len": None, "eval_stride": None, "max_rows": None, "format": "messages"}
    path = prompts(runs, *questions)
    return runs.data(**defaults, dataset="text", path=path, generate={"new_tokens": 12} | generate)


def two(runs: Runs, **first: Any) -> Path:
    return runs.models({"label": "Ref", "reference": True} | first, {"label": "Fake", "options": {"seed": 7}})


def kept(runs: Runs) -> list[Path]:
    """Files of answers."""
    files = (runs.folder / "store" / "answers").glob("*/*.json")
    return sorted(file for file in files if file.name != "identity.json")


def test_all_are_scored_on_the_references_tokens_and_prompts_do_not_count(runs: Runs) -> None:
    code, (ref, fake) = runs.compare(answers_data(runs, "One?", "Two, perhaps?"), two(runs))
    assert code == 0 and ref["protocol"] == "chat" and ref["is_reference"]
    assert ref["comparison"]["dataset"] == "answers of Ref to prompts.jsonl"
    assert ref["comparison"]["windows"] == 2 and ref["comparison"] == fake["comparison"]
    lengths = [len(json.loads(file.read_text())["ids"]) for file in kept(runs)]
    assert ref["tokens_scored"] == fake["tokens_scored"] == sum(lengths)
    note = next(note for note in fake["notes"] if note.startswith("the text is answers"))
    assert "greedy decoding of Ref by evalq" in note and "at most 12 tokens each" in note
    assert ref["bits_per_byte"] is not None


def test_ids_are_scored_as_they_were_generated_behind_the_prompts_own(runs: Runs) -> None:
    runs.compare(answers_data(runs, "One?"), two(runs))
    (answer,) = kept(runs)
    store = Store(runs.folder / "store")
    streams = [file for file in (store.root / "tokens").glob("*.safetensors")]
    from evalq.data.tokens import read_stream

    found = next(s for s in map(read_stream, streams) if s is not None and s.mask_N is not None)
    opening = b"user: One?\t\nassistant: "
    assert found.ids_N.tolist() == [*opening, *json.loads(answer.read_text())["ids"]]
    assert found.mask_N is not None and np.flatnonzero(found.mask_N)[0] == len(opening)
    assert found.mask_N[len(opening) :].all()


def test_answers_are_made_once_and_more_prompts_take_those_there_are(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [f"Question {i}?" for i in range(4)]
    data = answers_data(runs, *questions, n=2)
    assert runs.compare(data, two(runs))[0] == 0 and len(kept(runs)) == 2
    assert "Ref answers 2 of 2 prompts" in capsys.readouterr().err
    assert runs.compare(data, two(runs))[0] == 0
    assert "answers" not in capsys.readouterr().err, "they are kept"
    kept(runs)[0].unlink()
    kept(runs)[0].write_text("{")
    assert runs.compare(data, two(runs))[0] == 0
    assert "Ref answers 2 of 2 prompts" in capsys.readouterr().err, "lost and damaged ones are made again"
    assert runs.compare(answers_data(runs, *questions, n=3), two(runs))[0] == 0
    assert "Ref answers 1 of 3 prompts" in capsys.readouterr().err
    assert runs.compare(data, two(runs), more=("-cc",))[0] == 0
    assert "Ref answers 3 of 3 prompts" in capsys.readouterr().err


def test_what_was_answered_before_a_failure_is_kept(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    short = make_tiny(runs.folder / "short", max_position_embeddings=80)
    questions = [f"Question {i}?" for i in range(AT_ONCE)]
    data = answers_data(runs, *questions, "long " * 40, n=20)
    assert runs.compare(data, two(runs, model_dir=str(short)))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'the reference "Ref" cannot answer the prompts: a prompt and its new tokens need' in last
    assert "fewer new tokens" in last and len(kept(runs)) == AT_ONCE
    data = answers_data(runs, *questions, n=20)
    assert runs.compare(data, two(runs, model_dir=str(short)))[0] == 0
    assert "prompts, at most" not in capsys.readouterr().err


def test_another_model_or_limit_gives_answers_of_its_own(runs: Runs) -> None:
    runs.compare(answers_data(runs, "One?"), two(runs))
    runs.compare(answers_data(runs, "One?", new_tokens=13), two(runs))
    runs.compare(answers_data(runs, "One?"), two(runs, options={"seed": 3}))
    assert len(kept(runs)) == 3


def test_the_chats_are_kept_as_text_and_are_a_text_themselves(runs: Runs) -> None:
    _, (ref, _) = runs.compare(answers_data(runs, "One?"), two(runs))
    (file,) = (runs.folder / "store" / "answers").glob("*/chats-*.jsonl")
    (question, answer) = json.loads(file.read_text())["messages"]
    assert question["content"] == "One?" and answer["role"] == "assistant"
    nats = ref["nll_nats"] * ref["tokens_scored"]
    assert ref["bits_per_byte"] == pytest.approx(nats / len(answer["content"].encode()) / np.log(2))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            [{"label": "Alone"}],
            'there is no reference (name one with --reference LABEL, or "reference": true in its spec)',
        ),
        (
            [{"label": "Ref", "reference": True, "model_dir": "gone"}, {"label": "B"}],
            'the reference "Ref" cannot answer the prompts: ',
        ),
        (
            [{"label": "Ref", "reference": True, "options": {"misbehave": "oom-load"}}, {"label": "B"}],
            'the reference "Ref" cannot answer the prompts: ',
        ),
    ],
)
def test_who_cannot_answer_is_told_in_one_line(
    runs: Runs, models: list[dict[str, Any]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"tokenizer_dir": str(runs.tiny)}
    data = json.loads(answers_data(runs, "One?").read_text()) | tokenizer
    assert runs.compare(runs.write("data.json", data), runs.models(*models))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "Traceback" not in last


def test_an_engine_that_does_not_generate_is_told(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evalq.backends.fake import FakeBackend

    monkeypatch.setattr(FakeBackend, "generates", False)
    assert runs.compare(answers_data(runs, "One?"), two(runs))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "fake does not generate here (name a reference in another engine" in last


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"generate": {"new_tokens": 0}}, "generate.new_tokens"),
        ({"generate": {"temperature": 1}}, "unknown key"),
        ({"generate": {}, "format": "text"}, '"generate" answers conversations'),
        ({"generate": {}, "protocol": "gptq"}, 'conversations have protocol "chat"'),
    ],
)
def test_settings_of_answers_that_are_none(
    runs: Runs, spec: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.compare(runs.write("data.json", {"dataset": "sample-chat"} | spec), two(runs))[0] == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_name_the_questions_are_those_that_ship(runs: Runs) -> None:
    data = runs.write("data.json", {"generate": {"n": 2, "new_tokens": 4}, "tokenize_fn": "fake"})
    code, (ref, _) = runs.compare(data, two(runs))
    assert code == 0 and ref["comparison"]["dataset"] == "answers of Ref to sample-chat"
    assert ref["comparison"]["windows"] == 2


@pytest.mark.engine
@pytest.mark.parametrize("reference", ["hf", "gguf"])
def test_a_real_reference_finds_its_own_answers_the_most_probable(
    runs: Runs, smollm2: Callable[[str], Path], reference: str
) -> None:
    """Greedy decoding: each token is the argmax where it was generated, but for rounding in scoring."""
    specs = {"hf": ("BF16", smollm2("bf16")), "gguf": ("Q8_0", smollm2("Q8_0.gguf"))}
    models = runs.models(
        *(
            {"load_fn": e, "fwd_fn": e, "label": label, "model_dir": str(path), "reference": e == reference}
            for e, (label, path) in specs.items()
        )
    )
    data = answers_data(runs, "What is the capital of France?", "Count to three.", new_tokens=16)
    data.write_text(json.dumps(json.loads(data.read_text()) | {"tokenize_fn": "auto"}))
    code, records = runs.compare(data, models)
    assert code == 0, [record["error"] for record in records]
    by_label = {record["label"]: record for record in records}
    mine = by_label[specs[reference][0]]
    assert mine["top1"] >= 0.95 and mine["ppl"] < 3
    (file,) = (runs.folder / "store" / "answers").glob("*/chats-*.jsonl")
    first = json.loads(file.read_text().splitlines()[0])["messages"][-1]["content"]
    assert first.strip() and "<|im_" not in first
