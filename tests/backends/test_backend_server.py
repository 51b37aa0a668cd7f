"""Server: what is asked for, which answers are refused, what a result is told apart by."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_batches, score_one
from conftest import Runs
from scoring_server import IDS, KEY, Load, StandIn, loading, serving

from evalq.backends._server_contact import serves_elsewhere
from evalq.backends._server_options import OPTIONS
from evalq.backends._server_scores import WAYS, Choice, parsed
from evalq.backends.server import ServerBackend
from evalq.engine.backend import Batch, LoadRequest
from evalq.errors import ModelError

SERVER = ServerBackend()
ECHO = WAYS[1]

stand_in = pytest.fixture(serving)
load = pytest.fixture(loading)


def test_windows_come_back_in_order_with_a_bounded_number_in_flight(stand_in: StandIn, load: Load) -> None:
    stand_in.pause_seconds = 0.01
    model = load(max_in_flight=3)
    batches = [Batch(np.array([[2 * i, 50, 60], [2 * i + 1, 50, 60]]), 2) for i in range(20)]
    results = score_batches(SERVER, model, iter(batches))
    first = next(results)
    assert len(stand_in.windows) <= 12
    scores = [first, *results]
    np.testing.assert_allclose([s["logprob"][:, 0] for s in scores], -2 - np.arange(40).reshape(20, 2) / 1000)
    assert all(
        s["logprob"].shape == s["top1"].shape == (2, 1) and s["logprob"].dtype == np.float32 for s in scores
    )
    assert 2 <= stand_in.most <= 3
    assert len(stand_in.windows) == 40


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("first_target", [1, 3])
def test_element_i_is_the_token_i_given_those_before(
    stand_in: StandIn, load: Load, way: str, first_target: int
) -> None:
    stand_in.ways = (way,)
    model = load()
    scores = score_one(SERVER, model, IDS, first_target)
    np.testing.assert_allclose(
        scores["logprob"], [[-1.007, -2.007, -3.007, -4.007][first_target - 1 :]], rtol=1e-6
    )
    assert scores["top1"].tolist() == [[True, False, False, False][first_target - 1 :]]
    assert (model.dtype, model.vocab_size, model.notes) == ("the server's", 258, [])
    assert model.device == f"server 127.0.0.1:{stand_in.port}"


def test_echo_without_the_top_token_knows_top1_above_one_half_only() -> None:
    tokens = ["token_id:7", "token_id:3", "token_id:9", "text"]
    found = {"tokens": tokens, "token_logprobs": [None, -0.5, -0.8, -1.0]}
    scores = ECHO.read(Choice.model_validate({"logprobs": found}), IDS[0, :3], 0)
    assert set(scores) == {"logprob", "top1_bound"}
    assert scores["top1_bound"].tolist() == [True, False]
    assert scores["logprob"].tolist() == pytest.approx([-0.5, -0.8])


def test_an_echo_holds_the_most_probable_tokens_beside_the_text_s_own() -> None:
    found = {
        "tokens": ["token_id:7", "token_id:3", "token_id:9", "text"],
        "token_logprobs": [None, -0.5, -0.8, -1.0],
        "top_logprobs": [None, {"token_id:4": -0.25, "token_id:3": -0.5}, None, {"x": -1.0}],
    }
    top = ECHO.with_top(2).read_top(Choice.model_validate({"logprobs": found}), IDS[0, :3], 0)
    assert top["top_ids"].tolist() == [[4, 3], [9, -1]]
    assert top["top_logprobs"][0].tolist() == [-0.25, -0.5] and top["top_logprobs"][1, 0] == -0.8
    assert np.isnan(top["top_logprobs"][1, 1])


def change(at: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(answer: dict[str, Any]) -> Any:
        answer["choices"][0]["prompt_logprobs"][at] = value
        return answer

    return edit


def change_choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: answer | {"choices": [answer["choices"][0] | changes]}


WRONG: list[tuple[Callable[[dict[str, Any]], Any], str, str]] = [
    (change(2, {"8": {"logprob": -1.0, "rank": 1}}), "scored token 8 where the window has 9 .position 2", ""),
    (change(2, None), "no log-probability for position 2", ""),
    (change(2, {}), "no log-probability for position 2", ""),
    (change(2, {"9": {"rank": 1}}), r"prompt_logprobs\.2\.9\.logprob: Field required", ""),
    (change(2, {"9": {"logprob": float("inf")}}), "token 9 at position 2 the log-probability inf", ""),
    (change(2, {"9": {"logprob": 3.5}}), "log-probability 3.5 .*--logprobs-mode raw_logprobs", ""),
    (change_choice(prompt_logprobs=[None]), "returned 1 log-probabilities, not 5", ""),
    (change_choice(prompt_logprobs=None), 'no "prompt_logprobs" in the answer', ""),
    (change_choice(prompt_token_ids=[7, 3, 9, 4, 6]), "other ids than those of the window", ""),
    (lambda a: a | {"model": "another"}, 'asked for the model "m", .* with "another"', ""),
    (lambda a: a | {"system_fingerprint": "new"}, "another engine answers now: .* new, .* stand-in-1", ""),
    (lambda a: a | {"choices": a["choices"] * 2}, "returned 2 choices", ""),
    (lambda a: [a], "something else than expected", ""),
    (lambda a: b"[" * 50_000, "something else than expected: Invalid JSON", ""),
]


@pytest.mark.parametrize(("edit", "words", "category"), WRONG)
def test_wrong_answers_are_refused(
    stand_in: StandIn, load: Load, edit: Any, words: str, category: str
) -> None:
    model = load()
    stand_in.edit = edit
    with pytest.raises(ModelError, match=words) as caught:
        score_one(SERVER, model, IDS)
    assert caught.value.category == (category or "engine_error")
    assert len(stand_in.windows) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": ["token_id:7", "token_id:8", "token_id:9"]}, "scored token token_id:8 where .* has 3"),
        ({"tokens": ["a", "b", "c"]}, "without their ids"),
        ({"token_logprobs": [None, -1.0]}, "returned 2 log-probabilities, not 3"),
        ({"token_logprobs": [None, -1.0, None]}, "no log-probability for position 2"),
        ({"token_logprobs": [None, -1.0, 0.5]}, "token 9 at position 2 the log-probability 0.5"),
    ],
)
def test_wrong_echoes_are_refused(changes: dict[str, Any], words: str) -> None:
    right = {"tokens": ["token_id:7", "token_id:3", "token_id:9"], "token_logprobs": [None, -0.5, -0.8]}
    choice = Choice.model_validate({"logprobs": right | changes})
    with pytest.raises(ModelError, match=words):
        ECHO.read(choice, IDS[0, :3], 0)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [(-9999.0, -np.inf), (-1e300, -np.inf), (float("-inf"), -np.inf), (float("nan"), np.nan)],
)
@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_what_is_not_finite_is_kept_of_targets_and_nothing_of_the_context(
    stand_in: StandIn, load: Load, way: str, sent: float, kept: float
) -> None:
    stand_in.ways = (way,)
    model = load()

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        if way == "echo":
            choice["logprobs"]["token_logprobs"][2] = sent
        else:
            choice["prompt_logprobs"][2]["9"]["logprob"] = sent
        return answer

    stand_in.edit = edit
    whole = score_one(SERVER, model, IDS)["logprob"]
    np.testing.assert_array_equal(whole[0], np.float32([-1.007, kept, -3.007, -4.007]))
    after = score_one(SERVER, model, IDS, 3)["logprob"]
    np.testing.assert_array_equal(after[0], np.float32([-3.007, -4.007]))


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_another_token_in_the_context_is_refused(stand_in: StandIn, load: Load, way: str) -> None:
    stand_in.ways = (way,)
    model = load()

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        if way == "echo":
            choice["logprobs"]["tokens"][1] = "token_id:8"
        else:
            choice["prompt_logprobs"][1] = {"8": {"logprob": -1.0, "rank": 1}}
            del choice["prompt_token_ids"]
        return answer

    stand_in.edit = edit
    with pytest.raises(ModelError, match=r"scored token (token_id:)?8 where the window has 3 \(position 1\)"):
        score_one(SERVER, model, IDS, 4)


def test_which_model_is_asked_for(stand_in: StandIn, load: Load) -> None:
    first = stand_in.cards[0]
    stand_in.cards = [first, first | {"id": "alias"}]
    assert load(model="alias").handle.served.name == "alias"  # answers carry the first name
    score_one(SERVER, load(model="alias"), IDS)
    assert load().handle.served.name == "m"
    stand_in.cards.append(first | {"id": "lora", "root": "/adapters/a", "parent": "m"})
    with pytest.raises(ModelError, match=r'lists 3 models: "m", "alias", "lora" \(name one as "model"'):
        load()
    with pytest.raises(ModelError, match='no model "n" .it lists "m", "alias", "lora"') as caught:
        load(model="n")
    assert caught.value.category == "model_missing"
    notes = load(model="lora").notes
    assert notes[0] == "the server puts the adapter lora on m"
    stand_in.cards = []
    with pytest.raises(ModelError, match="lists 0 models: none"):
        load()


def test_servers_that_score_no_prompts_are_named(stand_in: StandIn, load: Load) -> None:
    stand_in.ways = ()
    with pytest.raises(ModelError, match="gives no log-probabilities of a prompt .*llama-server has none"):
        load()
    with pytest.raises(ModelError, match=r"nothing/v1/models answers 404: Not Found .*with /v1") as caught:
        load(base_url=f"{stand_in.url}/nothing/v1")
    assert caught.value.category == "bad_option"


def test_what_identifies_the_numbers(stand_in: StandIn, load: Load) -> None:
    found = SERVER.remote_versions({"base_url": stand_in.url})
    assert found == {"vllm": "1.2.3", "served_model": "m", "fingerprint": "stand-in-1"}
    assert next(iter(found)) == "vllm"
    assert OPTIONS["base_url"].numeric and OPTIONS["model"].numeric
    assert not OPTIONS["api_key_env"].numeric

    stand_in.version = None
    stand_in.cards[0]["owned_by"] = "somebody"
    stand_in.fingerprint = None
    assert SERVER.remote_versions({"base_url": stand_in.url}) == {"server": "unknown", "served_model": "m"}
    assert "does not tell its version" in load().notes[0]


def test_a_window_needs_a_position_more_than_it_has_tokens(stand_in: StandIn, load: Load) -> None:
    load(window_tokens=299)
    with pytest.raises(
        ModelError, match=r"300 tokens, .* max_model_len is 300 .*--max-model-len 301"
    ) as caught:
        load(window_tokens=300)
    assert caught.value.category == "window_too_long"


def test_another_model_than_the_checkpoint_is_noted(stand_in: StandIn, load: Load) -> None:
    stand_in.cards[0]["root"] = "owner/other-FP8"
    assert load().notes == ['the server says that it serves "owner/other-FP8"; the bits are those of tiny']
    hub = Path("/cache/models--owner--name/snapshots/3f2a")
    assert not serves_elsewhere("owner/name", hub) and serves_elsewhere("owner/name2", hub)
    assert not serves_elsewhere("/models/name", Path("/other/name"))


def test_an_overlay_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match="EXL3"):
        SERVER.load(LoadRequest(tiny, 10, 9, {"base_url": "http://127.0.0.1:1/v1"}, overlay=tiny))


def test_a_run_that_a_server_ends_continues(
    runs: Runs, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_KEY", KEY)
    stand_in.key = KEY
    options = {"base_url": stand_in.url, "api_key_env": "STAND_IN_KEY", "max_in_flight": 1, "retries": 0}
    models = runs.models({"load_fn": "server", "fwd_fn": "server", "options": options})
    count = itertools.count()
    stand_in.edit = lambda answer: answer if next(count) < 3 else {"error": KEY}
    code, (record,) = runs.compare(runs.data(), models)
    assert code == 1 and record["error"]["category"] == "engine_error"
    sent = len(stand_in.windows)
    assert sent < 6

    stand_in.edit = lambda answer: answer
    code, (record,) = runs.compare(runs.data(), models)
    assert code == 0 and record["tokens_scored"] == 6 * 255
    assert len(stand_in.windows) == sent + 3
    assert (record["engine_version"], record["peak_memory_gib"]) == ("vllm 1.2.3", None)
    assert record["identity"]["versions"]["fingerprint"] == "stand-in-1"
    for file in runs.folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file

    stand_in.version = {"version": "1.2.4"}
    _, (newer,) = runs.compare(runs.data(), models)
    assert newer["key"] != record["key"] and newer["engine_version"] == "vllm 1.2.4"


def test_what_is_not_json_names_the_address() -> None:
    with pytest.raises(ModelError, match="^http://h/v1 answers something else than expected: Invalid JSON"):
        parsed(Choice, b"<html>", "http://h/v1")
