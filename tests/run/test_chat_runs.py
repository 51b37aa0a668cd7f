"""Conversations through the whole way: template, mask, windows, scores, figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Runs

from evalq.cli.main import main
from evalq.data.tokens import read_stream
from evalq.results.store import Store

TWO_TURNS = [
    {"role": "system", "content": "One word."},
    {"role": "user", "content": "Sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And grass, naïve one?"},
    {"role": "assistant", "content": "Green 🙂"},
]
ONE_TURN = [{"role": "user", "content": "Five?"}, {"role": "assistant", "content": "1, 2, 3, 4, 5"}]
# What the assistant says in both, with the tab that ends a turn of the fake tokenizer's.
SAID = "Blue.\tGreen 🙂\t1, 2, 3, 4, 5\t".encode()


def chats(runs: Runs, *conversations: Any, name: str = "chat.jsonl") -> str:
    text = "\n".join(json.dumps({"messages": messages}) for messages in conversations)
    return str(runs.write(name, text + "\n"))


def chat_data(runs: Runs, *conversations: Any, **more: Any) -> Path:
    defaults = {"eval_len": None, "eval_stride": None, "max_rows": None}
    path = chats(runs, *conversations)
    return runs.data(**defaults | {"dataset": "text", "path": path, "format": "messages"} | more)


def counted_text(runs: Runs) -> list[str]:
    """What counts of each window, as text; the fake tokenizer's ids are bytes."""
    store = Store(runs.folder / "store")
    (file,) = (store.root / "tokens").glob("*.safetensors")
    stream = read_stream(file)
    (result,) = store.results()
    scores = result.scores()
    assert stream is not None and scores is not None and scores.windows is not None
    every = result.every_target()
    assert every is not None
    found = []
    for index, (_, end, start, _) in enumerate(scores.windows.tolist()):
        kept = np.ones(end - start, bool) if every.mask is None else every.mask[every.window_of == index]
        found.append(bytes(stream.ids_N[start:end][kept].tolist()).decode())
    return found


def test_only_what_the_assistant_says_counts(runs: Runs) -> None:
    data = chat_data(runs, TWO_TURNS, ONE_TURN)
    code, (record,) = runs.compare(data, runs.models({"options": {"mode": "uniform", "vocab_size": 512}}))
    assert code == 0 and record["protocol"] == "chat" and record["ppl"] == pytest.approx(512)
    assert counted_text(runs) == ["Blue.\tGreen 🙂\t", "1, 2, 3, 4, 5\t"]
    facts = record["comparison"]
    assert facts["windows"] == 2 and facts["unit"] == "token" and len(facts["mask_sha256"]) == 64
    assert facts["tokens_scored"] == record["tokens_scored"] == len(SAID)
    assert facts["eval_len"] == 4096 and not record["notes"][1:]


def test_a_mask_makes_a_result_of_its_own_which_takes_over_the_windows_it_shares(runs: Runs) -> None:
    models = runs.models({})
    _, (first,) = runs.compare(chat_data(runs, TWO_TURNS), models)
    _, (both,) = runs.compare(chat_data(runs, TWO_TURNS, ONE_TURN), models)
    assert first["key"] != both["key"]
    _, (rows,) = runs.compare(chat_data(runs, TWO_TURNS, ONE_TURN, max_rows=1), models)
    assert rows["ppl"] == first["ppl"] and rows["tokens_scored"] == first["tokens_scored"]


def test_figures_beside_the_reference_see_what_counts_and_no_more(runs: Runs) -> None:
    """A model that differs in the context only is no different."""
    models = runs.models(
        {"label": "Ref", "reference": True, "options": {"mode": "uniform"}},
        {"label": "Fake", "options": {"mode": "hashed"}},
    )
    code, records = runs.compare(chat_data(runs, TWO_TURNS, ONE_TURN), models, more=("--significance",))
    against = next(r for r in records if r["label"] == "Fake")["against_reference"]
    own = {r["label"]: r["nll_nats"] for r in records}
    assert code == 0 and against["ln_ratio"] == pytest.approx(own["Fake"] - own["Ref"], rel=1e-6)


def test_tokens_shows_places_of_the_assistants_tokens(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    data = chat_data(runs, TWO_TURNS, ONE_TURN)
    models = runs.models({"label": "Ref", "reference": True, "options": {"seed": 1}}, {"label": "Fake"})
    assert runs.compare(data, models)[0] == 0
    capsys.readouterr()
    assert main(["tokens", "Fake", "-n", "3", "--json", "-d", str(data)]) == 0
    shown = json.loads(capsys.readouterr().out)["positions"]
    turns = [*TWO_TURNS, *ONE_TURN]
    text = "".join(f"{m['role']}: {m['content']}\t\n" for m in turns).encode()
    for one in shown:
        assert text[one["position"]] == one["token"]["id"]
        assert one["token"]["id"] in SAID


def test_a_conversation_longer_than_a_window_is_cut_at_its_end_and_counted(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    start = len("system: One word.\t\nuser: Sky?\t\nassistant: ")
    data = chat_data(runs, TWO_TURNS, ONE_TURN, TWO_TURNS[1:3], eval_len=start + 3)
    code, (record,) = runs.compare(data, runs.models({}))
    assert code == 0 and counted_text(runs) == ["Blu", "1, 2, 3, 4, 5\t", "Blue.\t"]
    assert "1 of 3 conversations are longer than eval_len, 45 tokens: cut there" in record["notes"]
    assert "3 conversations of up to 45 tokens" in capsys.readouterr().out
    _, (record,) = runs.compare(
        chat_data(runs, TWO_TURNS, ONE_TURN, TWO_TURNS[1:3], eval_len=25), runs.models({}, name="b.json")
    )
    notes = [note for note in record["notes"] if "conversations" in note]
    assert notes[1] == "1 of 3 conversations say nothing of the assistant's within eval_len: left out"


def test_bits_per_byte_are_of_what_the_assistant_says(runs: Runs) -> None:
    data = chat_data(runs, ONE_TURN)
    _, (record,) = runs.compare(data, runs.models({"options": {"mode": "uniform", "vocab_size": 256}}))
    said = ONE_TURN[1]["content"]
    assert record["bits_per_byte"] == pytest.approx(8 * (len(said) + 1) / len(said)), "the turn's end too"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"protocol": "gptq"}, 'conversations have protocol "chat", not "gptq"'),
        ({"format": "text", "protocol": "chat"}, 'set "format": "messages"'),
        ({"chat_template": True}, 'remove "chat_template"'),
        ({"bos": "every_window"}, "chat puts its own prefix"),
        ({"eval_stride": 100}, "chat has no eval_stride"),
        ({"format": "sharegpt"}, "format: input should be 'text' or 'messages'"),
        ({"eval_len": 3}, "no token to score"),
    ],
)
def test_settings_that_no_chat_has(
    runs: Runs, spec: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.compare(chat_data(runs, ONE_TURN, **spec), runs.models({}))[0] == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_role_that_the_template_does_not_know_is_told_with_the_conversation(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [{"role": "narrator", "content": "\x1b[31mx"}, *ONE_TURN]
    assert runs.compare(chat_data(runs, ONE_TURN, other), runs.models({}))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "conversation 2: the chat template cannot be rendered: no such role: narrator" in last


def test_a_chat_without_answers_is_refused_before_anything_starts(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.compare(chat_data(runs, ONE_TURN, ONE_TURN[:1]), runs.models({}))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "chat.jsonl line 2 has no turn of the assistant" in last


# --- real tokenizers --------------------------------------------------------------------------------------


@pytest.mark.engine
def test_smollm2_scores_the_assistants_tokens_in_hf_and_gguf(
    runs: Runs, smollm2: Callable[[str], Path]
) -> None:
    """Against a plain loop: log-softmax of transformers' logits at the tokens after each header."""
    data = chat_data(runs, TWO_TURNS, ONE_TURN, tokenize_fn="auto")
    models = runs.models(
        {"load_fn": "hf", "fwd_fn": "hf", "label": "BF16", "model_dir": str(smollm2("bf16"))},
        {"load_fn": "gguf", "fwd_fn": "gguf", "label": "Q8_0", "model_dir": str(smollm2("Q8_0.gguf"))},
    )
    code, (bf16, q8) = runs.compare(data, models, more=("--kld",))
    assert code == 0, [record["error"] for record in (bf16, q8)]
    wanted = plain_nll(smollm2("bf16"), [TWO_TURNS, ONE_TURN])
    assert bf16["tokens_scored"] == q8["tokens_scored"] == wanted.size
    assert bf16["nll_nats"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    against = q8["against_reference"]
    assert against["metrics"]["kld"]["value"] < 0.05 and abs(against["ln_ratio"]) < 0.1


def plain_nll(model_dir: Path, chats: list[list[dict[str, str]]]) -> Any:
    """-ln P of each token between "assistant\\n" and the end of the turn, that one included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assistant, newline = tokenizer.encode("assistant"), tokenizer.encode("\n")
    header = [start, *assistant, *newline]
    found = []
    for messages in chats:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]])).logits[0].float()
        x = -torch.log_softmax(logits, -1)
        for i in range(len(ids)):
            if ids[i : i + len(header)] == header:
                stop = ids.index(end, i)
                found += [float(x[k - 1, ids[k]]) for k in range(i + len(header), stop + 1)]
    return np.array(found)


@pytest.mark.engine
def test_the_templates_of_hf_and_gguf_make_the_same_stream(
    runs: Runs, smollm2: Callable[[str], Path]
) -> None:
    streams = []
    for name in ("bf16", "Q8_0.gguf"):
        store = runs.folder / f"store-{name}"
        data = chat_data(runs, TWO_TURNS, ONE_TURN, tokenize_fn="auto", tokenizer_dir=str(smollm2(name)))
        assert runs.compare(data, runs.models({}), more=("--store", str(store)))[1]
        (file,) = (store / "tokens").glob("*.safetensors")
        streams.append(read_stream(file))
    hf, gguf = streams
    assert hf is not None and gguf is not None and hf.mask_N is not None and gguf.mask_N is not None
    assert np.array_equal(hf.ids_N, gguf.ids_N) and np.array_equal(hf.mask_N, gguf.mask_N)
    assert 0 < hf.mask_N.sum() < hf.mask_N.size
