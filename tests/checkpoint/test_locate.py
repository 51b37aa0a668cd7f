"""Models by hub name: the real huggingface_hub client against a small hub on this machine.

huggingface.co is out of reach for tests; the server below answers the requests the client makes.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tiny
from conftest import Runs

COMMITS = {"main": "a" * 40, "4.0bpw": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `files` as owner/name, refuses owner/gated, knows nothing else."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []  # type: ignore[var-annotated]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        if "/gated" in path:
            self._error(403, "GatedRepo")
        elif not ("/owner/name" in path or "/api/models/owner/name" in path):
            self._error(404, "RepoNotFound")
        elif path.startswith("/api/models/owner/name/tree/"):
            self._json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": _etag(d)}
                    for n, d in self.server.files.items()
                ]
            )
        elif path.startswith("/api/models/owner/name"):
            revision = path.rsplit("/revision/", 1)[-1] if "/revision/" in path else "main"
            commit = COMMITS.get(revision) or (revision if revision in COMMITS.values() else None)
            if commit is None:
                return self._error(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "owner/name", "modelId": "owner/name", "sha": commit, "siblings": siblings})
        else:
            commit, name = path.removeprefix("/owner/name/resolve/").split("/", 1)
            if name not in self.server.files:
                return self._error(404, "EntryNotFound")
            data = self.server.files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("X-Repo-Commit", COMMITS.get(commit, commit))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    do_HEAD = do_GET

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_tiny(tmp_path / "remote", seed=5)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files |= {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit", "notes/x.pdf": b"%PDF"}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def compare(
    runs: Runs, hub: Hub, *models: dict[str, Any], more: tuple[str, ...] = ()
) -> tuple[int, list[Any], str]:
    environment = dict(
        os.environ,
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HOME=str(runs.folder / "hf"),
        HF_TOKEN="hf_secretsecretsecret",
        HF_HUB_DISABLE_XET="1",
    )
    environment.pop("HF_HUB_OFFLINE", None)
    arguments = ["-d", str(runs.data()), "-m", str(runs.models(*models)), "--json", "out.json", *more]
    process = runs.process(*arguments, env=environment)
    _, errors = process.communicate(timeout=120)
    out = runs.folder / "out.json"
    return process.returncode, json.loads(out.read_text()) if out.is_file() else [], errors


def test_model_of_the_hub_is_fetched_and_scored(runs: Runs, hub: Hub) -> None:
    code, (record,), errors = compare(runs, hub, {"model_dir": "owner/name"})
    assert code == 0, errors
    assert record["status"] == "ok" and record["identity"]["model_commit"] == COMMITS["main"]
    fetched = {path.name for path in (runs.folder / "hf").rglob("snapshots/*/*")}
    assert {"model.safetensors", "config.json"} <= fetched
    assert not {"pytorch_model.bin", "modeling.py", "x.pdf"} & fetched, (
        "only what is needed, and nothing that runs"
    )
    kept = b"".join(file.read_bytes() for file in (runs.folder / "store").rglob("*") if file.is_file())
    assert b"secretsecret" not in kept and "secretsecret" not in errors, "no token in records or logs"

    asked = len(hub.asked)
    code, (again,), _ = compare(runs, hub, {"model_dir": "owner/name"}, more=("--offline",))
    assert code == 0 and again["key"] == record["key"]
    assert len(hub.asked) == asked, "offline: what was downloaded serves"


def test_revision(runs: Runs, hub: Hub) -> None:
    code, (record, missing), _ = compare(
        runs,
        hub,
        {"model_dir": "owner/name", "revision": "4.0bpw"},
        {"model_dir": "owner/name", "revision": "9bpw"},
    )
    assert code == 1 and record["identity"]["model_commit"] == COMMITS["4.0bpw"]
    assert missing["error"]["category"] == "model_missing" and '"9bpw"' in missing["error"]["message"]


def test_gated_unknown_and_unreachable(runs: Runs, hub: Hub) -> None:
    gated, unknown = {"model_dir": "owner/gated"}, {"model_dir": "nobody/nothing"}
    file = {"model_dir": "owner/name/none-Q4_K_M.gguf"}
    code, (_, no_login, nowhere, no_file), errors = compare(runs, hub, {}, gated, unknown, file)
    assert code == 1 and "Traceback" not in errors
    assert no_login["error"]["category"] == "model_gated"
    assert "hf auth login" in no_login["error"]["remedy"] and "owner/gated" in no_login["error"]["remedy"]
    assert nowhere["error"]["category"] == "model_missing" and "nobody/nothing" in nowhere["error"]["message"]
    assert no_file["error"]["category"] == "model_missing"
