"""A hub on this machine: the few requests of huggingface_hub that reading headers takes, from a folder.

usage: with LocalHub(folder) as hub: ... hub.url ... hub.bytes_sent

`folder` holds owner/name directories: of models, and in its folder `datasets` of data sets.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

CONVERTED = "refs/convert/parquet"  # where the hub keeps data sets that it converted itself
SHA = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    def __init__(self, folder: Path) -> None:
        self.bytes_sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, folder)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, folder: Path) -> None:
        path = request.path.partition("?")[0]
        path = path.replace("/api/datasets/", "/api/models/datasets/").replace("%2F", "/")
        if asked := re.fullmatch(r"/api/models/([\w./-]+)/paths-info/[\w.-]+", path):
            self._send_paths(request, folder / asked[1])
            return
        name = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
        rev = r"refs/convert/\w+|[\w.-]+"
        about = re.fullmatch(rf"/api/models/{name}(/revision/({rev}))?(/tree/[\w.-]+)?(/.+)?", path)
        file = re.fullmatch(rf"/{name}/resolve/({rev})/(.+)", path)
        repo = folder / (about or file)[1] if about or file else None
        revision = (about[3] if about else file[2]) if repo else None
        if repo is None or not repo.is_dir():
            self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", SHA, CONVERTED):
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif about and about[5] and not (repo / about[5][1:]).is_dir():
            self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif about and about[4]:
            within = repo / (about[5] or "")[1:]
            deep = "recursive=true" in request.path.lower()
            files = within.rglob("*") if deep else within.iterdir()
            self._send(request, 200, json.dumps(self._tree(repo, files)).encode())
        elif about:
            names = [{"rfilename": str(f.relative_to(repo))} for f in sorted(repo.rglob("*")) if f.is_file()]
            self._send(request, 200, json.dumps({"id": about[1], "sha": SHA, "siblings": names}).encode())
        elif not (repo / file[3]).is_file():
            self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(request, repo / file[3])

    def _tree(self, repo: Path, within: Iterable[Path]) -> list[dict]:
        """Files with their sizes, and folders."""
        return [
            {"type": "file", "path": str(path.relative_to(repo)), "size": path.stat().st_size, "oid": SHA}
            if path.is_file()
            else {"type": "directory", "path": str(path.relative_to(repo)), "oid": SHA}
            for path in sorted(within)
        ]

    def _send_paths(self, request: BaseHTTPRequestHandler, repo: Path) -> None:
        """Sizes of the files that were asked for by name."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        asked = {
            unquote(one.partition("=")[2]) for one in body.decode().split("&") if one.startswith("paths=")
        }
        known = [repo / name for name in asked if (repo / name).exists()]
        self._send(request, 200, json.dumps(self._tree(repo, known)).encode())

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        size, wanted = path.stat().st_size, request.headers.get("Range")
        first, last = 0, size - 1
        if wanted:
            begin, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            first, last = int(begin), min(int(end or last), last)
        with path.open("rb") as file:
            file.seek(first)
            data = b"" if request.command == "HEAD" else file.read(last - first + 1)
        tag = hashlib.sha1(str(path).encode()).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        headers["Content-Length"] = str(last - first + 1)
        self._send(request, 206 if wanted else 200, data, headers)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
            self.bytes_sent += len(data)
