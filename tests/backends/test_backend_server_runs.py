"""Server: whole comparisons with a server that changes, gives odd numbers, or tells what it should not."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Runs
from scoring_server import KEY, StandIn, send, serving, status

from evalq.results.store import Store
from evalq.results.tokens import TokenColumns

stand_in = pytest.fixture(serving)


def models_of(runs: Runs, stand_in: StandIn, **options: Any) -> Path:
    """A spec of the stand-in, asked for one window at a time."""
    options = {"base_url": stand_in.url, "max_in_flight": 1, "retries": 0} | options
    return runs.models({"load_fn": "server", "fwd_fn": "server", "options": options})


def scores_of(runs: Runs, record: dict[str, Any]) -> TokenColumns:
    found = Store(runs.folder / "store").result(record["key"]).scores()
    assert found is not None
    return found


def change_version(stand_in: StandIn) -> None:
    stand_in.version = {"version": "1.2.4"}


def change_fingerprint(stand_in: StandIn) -> None:
    stand_in.fingerprint = "stand-in-2"


def change_model(stand_in: StandIn) -> None:
    stand_in.cards = [stand_in.cards[0] | {"id": "n"}]


@pytest.fixture
def visits(runs: Runs, stand_in: StandIn) -> int:
    """How often a comparison contacts an unchanging server, from preparing the model to its last window."""
    code, _ = runs.compare(runs.data(), models_of(runs, stand_in), more=("--store", "other"))
    assert code == 0 and stand_in.visits >= 4
    return stand_in.visits


@pytest.mark.parametrize("change", [change_version, change_fingerprint, change_model])
def test_a_server_that_changes_on_the_way_is_noticed_whenever_it_does(
    runs: Runs, stand_in: StandIn, visits: int, change: Callable[[StandIn], None]
) -> None:
    before = (stand_in.version, stand_in.fingerprint, stand_in.cards)
    for last in range(1, visits):
        stand_in.version, stand_in.fingerprint, stand_in.cards = before
        stand_in.visits = 0
        stand_in.on_visit = lambda visit, last=last: change(stand_in) if visit > last else None
        code, (record,) = runs.compare(runs.data(), models_of(runs, stand_in))
        assert code == 1 and record["status"] == "failed", f"unnoticed after contact {last} of {visits}"
        assert record["error"]["category"] == "engine_error"
        assert "changed" in record["error"]["message"] and "run again" in record["error"]["remedy"]
        results = runs.folder / "store" / "results"
        assert list(results.glob("*/scores.safetensors")) == list(results.glob("*/parts/*")) == []

    stand_in.on_visit = lambda visit: None
    sent = len(stand_in.windows)
    code, (record,) = runs.compare(runs.data(), models_of(runs, stand_in))
    assert code == 0 and len(stand_in.windows) == sent + 6, "what the other server scored is not used"


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_minus_infinity_counts_where_it_is_a_target_and_nowhere_else(
    runs: Runs, stand_in: StandIn, way: str
) -> None:
    stand_in.ways = (way,)
    count = itertools.count()

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        # Targets of all windows but the first are their last 128 tokens.
        at = {1: 60, 3: 200}.get(next(count))
        choice = answer["choices"][0]
        if at is not None and way == "echo":
            choice["logprobs"]["token_logprobs"][at] = -9999.0
        elif at is not None:
            next(iter(choice["prompt_logprobs"][at].values()))["logprob"] = -9999.0
        return answer

    data = runs.data(protocol="hf-strided")
    _, (usual,) = runs.compare(data, models_of(runs, stand_in), more=("--store", "other"))
    stand_in.edit = edit
    code, (record,) = runs.compare(data, models_of(runs, stand_in))
    assert code == 0, record["error"]
    assert record["tokens_nonfinite"] == 1 and record["tokens_scored"] == usual["tokens_scored"]
    scores = scores_of(runs, record)
    logprob = scores.columns["logprob"]
    (lost,) = np.flatnonzero(~np.isfinite(logprob))
    assert logprob[lost] == -np.inf and scores.window_of[lost] == 3
    assert np.isfinite(record["ppl"])


def test_an_echo_without_the_most_probable_token_gives_a_bound_of_top1(runs: Runs, stand_in: StandIn) -> None:
    stand_in.ways, stand_in.gives_top = ("echo",), False

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["logprobs"]["token_logprobs"][1] = -0.5  # the only one above one half
        return answer

    stand_in.edit = edit
    code, (record,) = runs.compare(runs.data(), models_of(runs, stand_in))
    assert code == 0, record["error"]
    columns = scores_of(runs, record).columns
    assert set(columns) == {"logprob", "top1_bound"} and columns["top1_bound"].dtype == np.bool_
    assert np.array_equal(columns["top1_bound"], columns["logprob"] > np.log(0.5))
    assert columns["top1_bound"].sum() == 6
    assert record["top1"] is None and record["metrics"]["top1_bound"]["value"] == pytest.approx(6 / 1530)
    sent = len(stand_in.windows)
    code, (again,) = runs.compare(runs.data(), models_of(runs, stand_in))
    assert code == 0 and again["ppl"] == record["ppl"]
    assert len(stand_in.windows) == sent, "a column that it cannot give is not asked for again"


def as_name(stand_in: StandIn) -> None:
    stand_in.cards = [stand_in.cards[0] | {"id": KEY}]


def as_folder(stand_in: StandIn) -> None:
    stand_in.cards = [stand_in.cards[0] | {"root": f"/models/{KEY}"}]


def as_adapter(stand_in: StandIn) -> None:
    stand_in.cards = [stand_in.cards[0] | {"parent": KEY}]


def as_version(stand_in: StandIn) -> None:
    stand_in.version = {"version": KEY}


def as_fingerprint(stand_in: StandIn) -> None:
    stand_in.fingerprint = "f" * 100 + KEY  # where it is cut, half a key must not be left


def in_an_error(stand_in: StandIn) -> None:
    stand_in.script = [status(400, f"you sent {KEY}")]


def in_an_error_with_escapes(stand_in: StandIn) -> None:
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    stand_in.script = [lambda handler: send(handler, 400, f'{{"odd": "{escaped}"}}'.encode())]


def as_another_name(stand_in: StandIn) -> None:
    stand_in.edit = lambda answer: answer | {"model": "x" * 100 + KEY}


def as_another_fingerprint(stand_in: StandIn) -> None:
    stand_in.edit = lambda answer: answer | {"system_fingerprint": "x" * 100 + KEY}


def as_another_token(stand_in: StandIn) -> None:
    stand_in.ways = ("echo",)

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["logprobs"]["tokens"][9] = "x" * 100 + KEY
        return answer

    stand_in.edit = edit


def as_a_field(stand_in: StandIn) -> None:
    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["prompt_logprobs"][9] = {"x" * 90 + KEY: {"logprob": -1.0}}
        return answer

    stand_in.edit = edit


def as_the_only_names(stand_in: StandIn) -> None:
    stand_in.cards = [stand_in.cards[0] | {"id": f"{KEY}{i}", "root": f"/{i}"} for i in range(2)]


WELL = (as_name, as_folder, as_adapter, as_version, as_fingerprint)
WRONG = (
    in_an_error,
    in_an_error_with_escapes,
    as_another_name,
    as_another_fingerprint,
    as_another_token,
    as_a_field,
    as_the_only_names,
)


@pytest.mark.parametrize("tell", [*WELL, *WRONG])
def test_a_server_that_tells_the_key_gets_it_nowhere(
    runs: Runs,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tell: Callable[[StandIn], None],
) -> None:
    monkeypatch.setenv("STAND_IN_KEY", KEY)
    stand_in.key = KEY
    tell(stand_in)
    models = models_of(runs, stand_in, api_key_env="STAND_IN_KEY")
    code, (record,) = runs.compare(runs.data(), models)
    assert code == (0 if tell in WELL else 1), record["error"]
    told = "".join(capfd.readouterr())
    start, escaped = KEY[:8], "u0073"
    assert start not in told and escaped not in told
    for file in runs.folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert start.encode() not in content and escaped.encode() not in content, file
    if tell in WELL:
        _, (again,) = runs.compare(runs.data(), models)
        assert again["key"] == record["key"] and again["ppl"] == record["ppl"]
