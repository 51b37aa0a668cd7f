"""Server: retries, limits, the key, certificates, and the options that say so."""

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_calls import score_batches, score_one
from scoring_server import (
    IDS,
    KEY,
    Load,
    StandIn,
    drip,
    flood,
    hang_up,
    loading,
    send,
    serving,
    sleep,
    status,
)

from evalq.backends._server_options import read_settings
from evalq.backends.server import ServerBackend
from evalq.engine.backend import Batch, LoadRequest
from evalq.errors import ModelError

SERVER = ServerBackend()

stand_in = pytest.fixture(serving)
load = pytest.fixture(loading)


@pytest.mark.parametrize("failure", [status(429), status(503), status(500), hang_up])
def test_what_may_pass_is_tried_again(stand_in: StandIn, load: Load, failure: Any) -> None:
    model = load()
    stand_in.script = [failure, failure]
    scores = score_one(SERVER, model, IDS)
    np.testing.assert_allclose(scores["logprob"][0, 0], -1.007, rtol=1e-6)
    assert stand_in.windows == [IDS[0].tolist()] * 3


@pytest.mark.parametrize("asks", ["1", "date"])
def test_retry_after_is_honoured(stand_in: StandIn, load: Load, asks: str) -> None:
    model = load()
    if asks == "date":  # whole seconds, so between one and two from now
        asks = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    stand_in.script = [status(429, Retry_After=asks)]
    score_one(SERVER, model, IDS)
    assert 0.95 < stand_in.times[1] - stand_in.times[0] < 4


def test_a_pause_of_hours_is_not_waited_for(stand_in: StandIn, load: Load) -> None:
    model = load()
    stand_in.script = [status(503, "maintenance", Retry_After="7200")]
    with pytest.raises(ModelError, match=r"503: maintenance \(wants a pause of 7200 s\)"):
        score_one(SERVER, model, IDS)
    assert len(stand_in.windows) == 1


@pytest.mark.parametrize(
    ("failure", "n_tries", "words", "category"),
    [
        (status(503, "engine is dead"), 3, "completions answers 503: engine is dead", "engine_error"),
        (hang_up, 3, "completions was lost: ", "engine_error"),
        (status(400, "prompt too odd"), 1, "completions answers 400: prompt too odd$", "engine_error"),
        (status(403, "not you"), 1, "403: not you .*api_key_env", "bad_option"),
        (status(400, "\x1b[2Jred\n" * 200), 1, r"400: \\x1b\[2Jred \\x1b.{200,320}\.\.\.$", "engine_error"),
        (flood, 1, "the answer is larger than 75,776 bytes", "engine_error"),
    ],
)
def test_what_does_not_pass_is_one_line(
    stand_in: StandIn, load: Load, failure: Any, n_tries: int, words: str, category: str
) -> None:
    model = load()
    stand_in.script = [failure] * 9
    with pytest.raises(ModelError, match=words) as caught:
        score_one(SERVER, model, IDS)
    assert caught.value.category == category and "\n" not in str(caught.value)
    assert len(stand_in.windows) == n_tries


@pytest.mark.parametrize("failure", [sleep, drip])
def test_a_server_that_does_not_answer_is_given_up(stand_in: StandIn, load: Load, failure: Any) -> None:
    model = load(timeout_seconds=0.5, retries=0)
    stand_in.script = [failure]
    with pytest.raises(ModelError, match=r"gave no answer within 0.5 s \(raise timeout_seconds") as caught:
        score_one(SERVER, model, IDS)
    assert caught.value.category == "timeout"


def test_windows_left_are_not_sent_when_scoring_ends_early(stand_in: StandIn, load: Load) -> None:
    model = load(max_in_flight=1)
    stand_in.script = [status(200), status(400, "no more")]
    stand_in.script[0] = lambda handler: send(
        handler, 200, stand_in.answer({"prompt": [5, 6], "prompt_logprobs": 0})
    )
    results = score_batches(SERVER, model, [Batch(np.array([[5, 6]]), 1)] * 50)
    assert next(results)["logprob"].shape == (1, 1)
    with pytest.raises(ModelError, match="no more"):
        next(results)
    sent = len(stand_in.windows)
    assert sent < 10
    time.sleep(0.1)
    assert len(stand_in.windows) <= sent + 1


def test_the_key_does_not_follow_a_redirect(
    stand_in: StandIn, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_KEY", f"{KEY}\n")
    other = StandIn()
    try:
        stand_in.key = KEY
        model = load(api_key_env="STAND_IN_KEY")
        stand_in.script = [status(307, Location=f"{other.url}/completions?{KEY}")]
        with pytest.raises(ModelError, match="redirects to .*, which is not followed") as caught:
            score_one(SERVER, model, IDS)
        assert other.headers == [] and KEY not in str(caught.value)
        assert {head["Authorization"] for head in stand_in.headers} == {f"Bearer {KEY}"}
        assert KEY not in repr(read_settings({"base_url": stand_in.url, "api_key_env": "STAND_IN_KEY"}))
    finally:
        other.stop()


def test_a_wrong_key_is_not_shown(stand_in: StandIn, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.key = "right"
    with pytest.raises(ModelError, match="401: wrong key: .*the server wants a key"):
        load()
    monkeypatch.setenv("STAND_IN_KEY", KEY)
    with pytest.raises(ModelError, match=r"401: wrong key: \\x1b\[31mBearer \*\*\* ") as caught:
        load(api_key_env="STAND_IN_KEY")
    assert caught.value.category == "bad_option" and KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "base_url is missing"),
        ({"base_url": f"http://user:{KEY}@host/v1"}, "no user, password"),
        ({"base_url": f"https://host/v1?api_key={KEY}"}, "no user, password, query"),
        ({"base_url": "host:8000/v1"}, '"host:8000/v1" is not an http'),
        ({"base_url": "http://host:x/v1"}, "is not an http"),
        ({"base_url": "ftp://host/v1"}, "is not an http"),
        ({"base_url": "http://ho st/v1"}, "is not an http"),
        ({"base_url": "http://h/v1", "api_key_env": KEY}, "NAME of an environment variable in capitals"),
        ({"base_url": "http://h/v1", "api_key_env": "NO_SUCH"}, "variable NO_SUCH .* is not set"),
        ({"base_url": "http://h/v1", "api_key_env": "ODD"}, "key in ODD .* no HTTP header"),
        ({"base_url": "http://h:80/v1", "api_key_env": "GOOD"}, "would go to h:80 unencrypted"),
        ({"base_url": "http://127.0.0.1.evil/v1", "api_key_env": "GOOD"}, "unencrypted"),
        ({"base_url": "http://h/v1", "max_in_flight": 0}, "max_in_flight is 0, it should be at least 1"),
        ({"base_url": "http://h/v1", "retries": -1}, "retries is -1"),
        ({"base_url": "http://h/v1", "timeout_seconds": float("inf")}, "timeout_seconds is inf"),
    ],
)
def test_options_that_cannot_work_are_one_line(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOD", KEY)
    monkeypatch.setenv("ODD", f"{KEY}\r\nX: y")
    with pytest.raises(ModelError, match=words) as caught:
        read_settings(options)
    assert caught.value.category == "bad_option" and KEY not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_a_key_may_go_to_this_machine_unencrypted(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD", KEY)
    settings = read_settings({"base_url": f"http://{host}/v1/", "api_key_env": "GOOD"})
    assert (settings.base_url, settings.key, settings.is_local) == (f"http://{host}/v1", KEY, True)


def test_a_proxy_is_not_given_what_is_for_this_machine(
    stand_in: StandIn, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert score_one(SERVER, load(), IDS)["logprob"].shape == (1, 4)


def test_certificates_are_verified(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=me"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(tmp_path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "cert").read_bytes())
    secure = StandIn(pem)
    try:
        url = secure.url.replace("http:", "https:")
        request = LoadRequest(tiny, 10, 9, {"base_url": url, "retries": 0})
        with pytest.raises(ModelError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
            SERVER.load(request)
        assert secure.headers == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        model = SERVER.load(request)
        assert score_one(SERVER, model, IDS)["logprob"].shape == (1, 4)
        SERVER.close(model)
    finally:
        secure.stop()


def test_a_server_that_is_down_is_one_line_at_once(tiny: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match=rf"cannot connect to {url}/models: .*start the server"):
            SERVER.load(LoadRequest(tiny, 10, 9, {"base_url": url}))
