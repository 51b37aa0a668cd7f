"""HTTP to one server: bounded answers, bounded patience, and nothing that shows the key.

A request is repeated after 429 (too many requests), 5xx and a lost connection, with exponential back-off and
jitter, or after what Retry-After asks for. Redirects are not followed: the key is for one host. Answers are
read as they were sent (no compression), so their size on the wire is their size in memory.

A server knows the key and may send it back in any text, its model's name included. So what it says is stored
or shown only through `Client.shown`, and what goes wrong leaves the backend through `Client.keeping_key`.

Source: https://www.rfc-editor.org/rfc/rfc9110 (status codes, Retry-After)
"""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

from evalq.backends._server_options import Settings
from evalq.checkpoint.damage import clipped
from evalq.errors import ModelError

CONNECT_SECONDS = 10.0
PAUSE_SECONDS_MAX = 30.0
RETRY_AFTER_SECONDS_MAX = 600.0
ERROR_BYTES_MAX = 65_536
# Shorter ones are no secret, and are found in every other number and name.
KEY_CHARACTERS_MIN = 4
_START = "start the server (vllm serve ...) or correct base_url"
_TRUST = "let an authority that this machine trusts sign the certificate, or name it in SSL_CERT_FILE"
_RESUMES = "run again when the server is well: it continues where it was"


class NotOffered(ModelError):
    """The server answers, but not with what was asked for."""


class _Temporary(Exception):
    """May go well the next time.

    Args:
        error: what to say when it does not.
        wait_seconds: how long the server asks to wait.
        is_lost: there was no answer at all.
    """

    def __init__(self, error: ModelError, wait_seconds: float = 0.0, is_lost: bool = True) -> None:
        super().__init__(error.message)
        self.error, self.wait_seconds, self.is_lost = error, wait_seconds, is_lost


@dataclass(frozen=True)
class _Asked:
    """One request: method, address, JSON body (None for none) and the largest answer."""

    method: str
    url: str
    body: dict[str, Any] | None
    bytes_max: int


class Client:
    """Connections to a server; may be used from several threads."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is sent yet."""
        import httpx2

        self.settings = settings
        headers = {"Accept-Encoding": "identity"}
        if settings.key is not None:
            headers["Authorization"] = f"Bearer {settings.key}"
        seconds = settings.timeout_seconds
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds), pool=None),
            limits=httpx2.Limits(max_connections=settings.max_in_flight),
            follow_redirects=False,
            trust_env=not settings.is_local,
        )

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def shown(self, text: str, limit: int = 120) -> str:
        """A server's words, without the key, printable and short enough for one line."""
        return clipped(self._without_key(text), limit)

    @contextlib.contextmanager
    def keeping_key(self) -> Iterator[None]:
        """Take the key out of whatever is raised."""
        try:
            yield
        except ModelError as error:
            remedy = None if error.remedy is None else self._without_key(error.remedy)
            raise type(error)(self._without_key(error.message), error.category, remedy) from None
        except Exception as error:
            words = str(error)
            if self._without_key(words) == words:
                raise
            raise ModelError(f"{type(error).__name__}: {self.shown(words, 300)}", "engine_error") from None

    def _without_key(self, text: str) -> str:
        key = self.settings.key
        if key is None or len(key) < KEY_CHARACTERS_MIN:
            return text
        for form in (key, key.encode("unicode_escape").decode("ascii")):
            text = text.replace(form, "***")
        return text

    def get(self, url: str, bytes_max: int) -> bytes:
        """An answer to GET; a server that is not there is not waited for. Raises ModelError, NotOffered."""
        return self._patiently(_Asked("GET", url, None, bytes_max), Event(), wait_for_server=False)

    def post(self, url: str, body: dict[str, Any], bytes_max: int, stop: Event) -> bytes:
        """An answer to POST; `stop` ends the waiting between tries. Raises ModelError, NotOffered."""
        return self._patiently(_Asked("POST", url, body, bytes_max), stop, wait_for_server=True)

    def _patiently(self, asked: _Asked, stop: Event, wait_for_server: bool) -> bytes:
        attempt = 0
        while True:
            try:
                return self._once(asked)
            except _Temporary as problem:
                pause = min(PAUSE_SECONDS_MAX, 0.5 * 2**attempt) * random.uniform(0.5, 1)
                pause = max(pause, problem.wait_seconds)
                if (
                    attempt >= self.settings.retries
                    or pause > RETRY_AFTER_SECONDS_MAX
                    or (problem.is_lost and not wait_for_server)
                    or stop.wait(pause)
                ):
                    raise problem.error from None
                attempt += 1

    def _once(self, asked: _Asked) -> bytes:
        import httpx2

        deadline = time.monotonic() + self.settings.timeout_seconds
        try:
            with self._http.stream(asked.method, asked.url, json=asked.body) as response:
                content = self._read(response, asked, deadline)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            words = self._clean(str(error)) or "no answer"
            remedy = _TRUST if "CERTIFICATE_VERIFY_FAILED" in words else _START
            message = f"cannot connect to {asked.url}: {words}"
            raise _Temporary(ModelError(message, "engine_error", remedy)) from None
        except httpx2.TimeoutException:
            raise _Temporary(self._too_late(asked)) from None
        except httpx2.TransportError as error:
            words = self._clean(str(error)) or type(error).__name__
            message = f"the connection to {asked.url} was lost: {words}"
            raise _Temporary(ModelError(message, "engine_error", _RESUMES)) from None
        if response.status_code == 200:
            return content
        raise self._failure(asked, response.status_code, response.headers, content)

    def _read(self, response: Any, asked: _Asked, deadline: float) -> bytes:
        """The body, to its largest size; of an error's only the beginning counts."""
        is_error = response.status_code != 200
        bytes_max = ERROR_BYTES_MAX if is_error else asked.bytes_max
        content = bytearray()
        for chunk in response.iter_raw():
            content += chunk
            if len(content) > bytes_max and is_error:
                break
            if len(content) > bytes_max:
                message = f"{asked.url}: the answer is larger than {bytes_max:,} bytes"
                raise ModelError(message, "engine_error", "see what listens there: scores are far smaller")
            if time.monotonic() > deadline:
                raise _Temporary(self._too_late(asked))
        return bytes(content[:bytes_max])

    def _too_late(self, asked: _Asked) -> ModelError:
        return ModelError(
            f"{asked.url} gave no answer within {self.settings.timeout_seconds:g} s",
            "timeout",
            "raise timeout_seconds or lower max_in_flight in the model's options; run again to continue",
        )

    def _failure(self, asked: _Asked, status: int, headers: Any, content: bytes) -> Exception:
        """What a status other than 200 means, with the server's own words."""
        message = f"{asked.url} answers {status}: {self._clean(_own_words(content)) or 'nothing else'}"
        if status == 429 or status >= 500:
            wait = _wait_seconds(headers.get("retry-after", ""))
            asks = f" (wants a pause of {wait:.0f} s)" if wait > RETRY_AFTER_SECONDS_MAX else ""
            return _Temporary(ModelError(message + asks, "engine_error", _RESUMES), wait, is_lost=False)
        if 300 <= status < 400:
            target = self._clean(headers.get("location", "nowhere"))
            message = f"{asked.url} redirects to {target}, which is not followed"
            return ModelError(message, "bad_option", "if that is your server, name it as base_url")
        if status in (401, 403):
            wrong = "the key that api_key_env names is not the server's"
            missing = "the server wants a key: name the variable that holds it in api_key_env"
            return ModelError(message, "bad_option", wrong if self.settings.key else missing)
        return NotOffered(message, "engine_error")

    def _clean(self, text: str) -> str:
        """A server's words about an error, their lines joined."""
        return self.shown(" ".join(text.split()), 300)


def _own_words(content: bytes) -> str:
    """The message in an error's body: {"error": {"message": ...}} and its relatives, else the body.

    JSON comes without its escapes, in which a key would not be recognized.
    """
    text = content.decode("utf-8", errors="replace")
    try:
        found = decoded = json.loads(text)
        while isinstance(found, dict):
            named = [found[name] for name in ("error", "message", "detail") if name in found]
            if not named:
                break
            found = named[0]
        return found if isinstance(found, str) else json.dumps(decoded, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _wait_seconds(text: str) -> float:
    """Retry-After: seconds, or a date; 0 where it says neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else 0.0
