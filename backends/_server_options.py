"""What a server spec's "options" say, checked before anything is sent.

The key comes from an environment variable and from nowhere else: it is in no spec, record, message or log.
It leaves this machine encrypted or not at all.
"""

import ipaddress
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from evalq.checkpoint.damage import clipped
from evalq.engine.backend import Option
from evalq.errors import ModelError

OPTIONS = {
    "base_url": Option((str,), "where the server listens, http://127.0.0.1:8000/v1 (required)", numeric=True),
    "model": Option((str,), "the server's name for it (default: the only model it lists)", numeric=True),
    "api_key_env": Option((str,), "NAME, in capitals, of the environment variable that holds the API key"),
    "top_k": Option(
        (int,),
        "with --kld: the model's most probable tokens that a lower bound is taken from (default 20, which "
        "vLLM allows unless started with --max-logprobs)",
        numeric=True,
        minimum=1,
    ),
    "max_in_flight": Option((int,), "windows at the server at once (default 8)"),
    "timeout_seconds": Option((int, float), "longest wait for one answer (default 300)"),
    "retries": Option(
        (int,), "repeats after 429, 5xx or a lost connection (default 8, about a minute in all)"
    ),
}
IN_FLIGHT = 8
TOP_K = 20
TIMEOUT_SECONDS = 300
RETRIES = 8
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Settings:
    """A server and how to talk to it.

    Args:
        base_url: up to and with /v1, no slash at its end.
        host: the server's, with the port where one is named.
        is_local: plain HTTP to this machine, where no proxy belongs in between.
        model: the server's name for it, None for the only one.
        key: sent as a bearer token, None for none.
        max_in_flight: requests at once.
        timeout_seconds: longest wait for one answer.
        retries: repeats of one request.
    """

    base_url: str
    host: str
    is_local: bool
    model: str | None
    key: str | None = field(repr=False)
    max_in_flight: int
    timeout_seconds: float
    retries: int


def read_settings(options: dict[str, Any]) -> Settings:
    """Settings from options whose types are right. Raises ModelError (bad_option)."""
    url = _url(options.get("base_url", ""))
    key = _key(options.get("api_key_env"))
    is_plain, is_here = url.scheme == "http", _is_loopback(url.hostname or "")
    if key is not None and is_plain and not is_here:
        raise ModelError(
            f"the API key would go to {url.netloc} unencrypted",
            "bad_option",
            "take an https base_url, or a tunnel that ends on 127.0.0.1",
        )
    settings = Settings(
        base_url=url.geturl(),
        host=url.netloc,
        is_local=is_plain and is_here,
        model=options.get("model"),
        key=key,
        max_in_flight=options.get("max_in_flight", IN_FLIGHT),
        timeout_seconds=options.get("timeout_seconds", TIMEOUT_SECONDS),
        retries=options.get("retries", RETRIES),
    )
    for name, least in (("max_in_flight", 1), ("retries", 0)):
        if getattr(settings, name) < least:
            raise ModelError(f"{name} is {options[name]}, it should be at least {least}", "bad_option")
    if not 0 < settings.timeout_seconds <= 86_400:
        raise ModelError(
            f"timeout_seconds is {settings.timeout_seconds}, it should be above 0 and at most a day",
            "bad_option",
        )
    return settings


def _url(text: str) -> SplitResult:
    """A base_url in its parts; one that may hold a secret is not shown."""
    remedy = "for example http://127.0.0.1:8000/v1"
    if not text:
        raise ModelError("options.base_url is missing: where the server listens", "bad_option", remedy)
    if any(sign in text for sign in "@?#"):
        raise ModelError(
            "base_url should hold no user, password, query or fragment",
            "bad_option",
            "put the key into an environment variable and its name into api_key_env",
        )
    try:
        url = urlsplit(text.rstrip("/"))
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, brackets without an end
        is_url = False
    if not is_url or re.search(r"[^!-~]", text):
        raise ModelError(f'base_url "{clipped(text)}" is not an http(s) address', "bad_option", remedy)
    return url


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(variable: str | None) -> str | None:
    """The key; a "variable" that does not look like a name may be the key itself and is not shown."""
    if variable is None:
        return None
    if not _VARIABLE.fullmatch(variable):
        raise ModelError(
            "api_key_env should be the NAME of an environment variable in capitals, never the key",
            "bad_option",
            'for example "api_key_env": "VLLM_API_KEY"',
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ModelError(
            f"the environment variable {variable} (api_key_env) is not set",
            "bad_option",
            f"export {variable}=... before the run",
        )
    if not _KEY.fullmatch(key):
        raise ModelError(
            f"the key in {variable} (api_key_env) holds characters that no HTTP header can", "bad_option"
        )
    return key
