"""A scoring server on a real socket, for what a healthy vLLM server does not do on demand; its fixtures."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalq.backends import _server_client
from evalq.backends._server_contact import PROBE_IDS
from evalq.backends.server import ServerBackend
from evalq.engine.backend import LoadedModel, LoadRequest

KEY = "sk-Kept-To-Itself-31415"
IDS = np.array([[7, 3, 9, 4, 5]], np.int64)
Handler = BaseHTTPRequestHandler
Load = Callable[..., LoadedModel]


class StandIn:
    """A scoring server on a real socket, for what a healthy vLLM server does not do on demand.

    The log-probability of a window's token i is -i - (first id) / 1000 and token 1 is the top one. `script`
    holds how the next windows are answered instead (the probe of load() is always answered well), `edit`
    changes every window's answer, `on_visit` whatever it likes when a contact begins.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.cards = [{"id": "m", "owned_by": "vllm", "root": "/models/tiny", "max_model_len": 300}]
        self.key: str | None = None
        self.ways = ("prompt_logprobs", "echo")
        self.version: dict[str, Any] | None = {"version": "1.2.3"}
        self.fingerprint: str | None = "stand-in-1"
        self.gives_top = True  # in echoes: the most probable token beside the prompt's
        self.visits = 0  # how often its models were listed, with which every contact begins
        self.on_visit: Callable[[int], None] = lambda visit: None
        self.edit: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.script: list[Callable[[Handler], None]] = []
        self.headers: list[dict[str, str]] = []
        self.windows: list[list[int]] = []
        self.times: list[float] = []
        self.pause_seconds, self.now, self.most, self.lock = 0.0, 0, 0, threading.Lock()
        self.http = _server(self)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def get(self, handler: Handler) -> None:
        if handler.path == "/v1/models":
            self.visits += 1
            self.on_visit(self.visits)
        listing = {"/v1/models": {"data": self.cards}, "/version": self.version}.get(handler.path)
        if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            sent = handler.headers["Authorization"]
            send(handler, 401, {"error": {"message": f"wrong key:\n\x1b[31m{sent}"}})
        elif listing is None:
            send(handler, 404, {"detail": "Not Found"})
        else:
            send(handler, 200, listing)

    def post(self, handler: Handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        ids = body["prompt"]
        is_probe = ids == PROBE_IDS.tolist()
        with self.lock:
            self.headers.append(dict(handler.headers))
            if not is_probe:
                self.windows.append(ids)
                self.times.append(time.monotonic())
            scripted = self.script.pop(0) if self.script and not is_probe else None
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.pause_seconds * (ids[0] % 3))
            if scripted is not None:
                scripted(handler)
            else:
                answer = self.answer(body)
                send(handler, 200, answer if is_probe else self.edit(answer))
        finally:
            with self.lock:
                self.now -= 1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        values = [None, *(-i - ids[0] / 1000 for i in range(1, len(ids)))]
        choice: dict[str, Any] = {"text": "x"}
        if "prompt_logprobs" in body and "prompt_logprobs" in self.ways:
            ranked = [(i, {"logprob": x, "rank": 1 if i == 1 else 7}) for i, x in enumerate(values)]
            choice["prompt_logprobs"] = [None, *({str(ids[i]): entry} for i, entry in ranked[1:])]
            choice["prompt_token_ids"] = ids
        if body.get("echo") and "echo" in self.ways:
            tokens = [f"token_id:{token}" for token in ids]
            best = [None, *({"token_id:0": -1.5, tokens[i]: values[i]} for i in range(1, len(ids)))]
            top = {"top_logprobs": best} if self.gives_top else {}
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values} | top
        name = self.cards[0]["id"] if self.cards else "m"
        return {"model": name, "choices": [choice], "system_fingerprint": self.fingerprint}


def _server(stand_in: StandIn) -> ThreadingHTTPServer:
    class Serving(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            stand_in.get(self)

        def do_POST(self) -> None:
            stand_in.post(self)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is what some tests are about."""

    return Quiet(("127.0.0.1", 0), Serving)


def send(handler: Handler, status: int, value: Any, **headers: str) -> None:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, content in headers.items():
        handler.send_header(name.replace("_", "-"), content)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, words: str = "busy", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: send(handler, code, {"error": {"message": words}}, **headers)


def hang_up(handler: Handler) -> None:
    """Half an answer, then the end of the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"model": "m", "cho')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def sleep(handler: Handler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """A byte now and then, each in time for a limit on single reads."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def flood(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    chunk = b"10000\r\n" + b"[" * 65536 + b"\r\n"
    for _ in range(1000):
        handler.wfile.write(chunk)


def serving() -> Iterator[StandIn]:
    """Fixture `stand_in`."""
    made = StandIn()
    yield made
    made.stop()


def loading(stand_in: StandIn, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Fixture `load`: loads from the stand-in with short pauses between tries, and hangs up at the end."""
    monkeypatch.setattr(_server_client, "PAUSE_SECONDS_MAX", 0.02)
    server = ServerBackend()
    loaded: list[LoadedModel] = []

    def run(window_tokens: int = 256, **options: Any) -> LoadedModel:
        options = {"base_url": stand_in.url, "retries": 2} | options
        request = LoadRequest(tiny, window_tokens, window_tokens - 1, options, token_ids_max=257)
        loaded.append(server.load(request))
        return loaded[-1]

    yield run
    for model in loaded:
        server.close(model)
