"""What a server answers, and the scores in it.

Two ways to ask for the log-probabilities of a prompt, both of vLLM's OpenAI-compatible server:

- `prompt_logprobs`: a list with one dictionary per token, {id: {"logprob", "rank"}}, null for the first.
- `echo` (other servers' way): the prompt comes back before what is generated, `logprobs.token_logprobs[i]`
  for token i, null for the first. Tokens come as "token_id:N", or there is no telling what was scored.

-inf arrives as -9999.0, because JSON has no infinity.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from evalq.backends._server_client import NotOffered
from evalq.backends._vllm_scores import LN_HALF, Row
from evalq.engine.columns import LOGPROB, TOP1, TOP1_BOUND
from evalq.errors import ModelError

Ids = NDArray[np.int64]
MINUS_INFINITY = -9999.0
# A log-probability above zero by more than rounding is none.
ROUNDING = 1e-3


class Version(BaseModel):
    """GET /version of vLLM."""

    version: str


class ModelCard(BaseModel):
    """One model of GET /v1/models; the last three are vLLM's."""

    id: str
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    data: list[ModelCard]


class Entry(BaseModel):
    """A token of `prompt_logprobs`."""

    logprob: float
    rank: int | None = None


class Echoed(BaseModel):
    """`logprobs` of a choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(BaseModel):
    """One of `choices`."""

    prompt_logprobs: list[dict[int, Entry] | None] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: Echoed | None = None


class Answer(BaseModel):
    """POST /v1/completions."""

    model: str
    choices: list[Choice]
    system_fingerprint: str | None = None


_M = TypeVar("_M", bound=BaseModel)


def parsed(kind: type[_M], content: bytes, url: str) -> _M:
    """An answer as what it should be. Raises NotOffered with the first place where it is not."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = _whole(".".join(str(part) for part in first["loc"]))
        message = f"{url} answers something else than expected: {place}{': ' if place else ''}{first['msg']}"
        raise NotOffered(message, "engine_error") from None


# Beside a window's columns, where they are asked for: the most probable tokens' ids and log-probabilities,
# [R, K].
TOP_IDS, TOP_LOGPROBS = "top_ids", "top_logprobs"


@dataclass(frozen=True)
class Way:
    """How to ask for a prompt's log-probabilities.

    Args:
        name: of the parameter that asks for them.
        asks: what the request holds beside model and prompt.
        read: scores of a choice for a window's ids, from a position on.
        read_top: the most probable tokens in a choice that was read, from a position on.
        top_k: how many of them are asked for; 0 for none.
    """

    name: str
    asks: dict[str, Any]
    read: Callable[[Choice, Ids, int], Row]
    read_top: Callable[[Choice, Ids, int], Row]
    top_k: int = 0

    def with_top(self, top_k: int) -> "Way":
        """The same way, with the most probable tokens of each position."""
        parameter = "prompt_logprobs" if "prompt_logprobs" in self.asks else "logprobs"
        return replace(self, asks=self.asks | {parameter: top_k}, top_k=top_k)


def from_prompt_logprobs(choice: Choice, ids_T: Ids, start: int) -> Row:
    """Scores of ids_T[start+1:]. Raises NotOffered (there are none), ModelError (not of these tokens)."""
    found = choice.prompt_logprobs
    if found is None:
        raise NotOffered('no "prompt_logprobs" in the answer', "engine_error")
    _check_count(len(found), len(ids_T))
    entries: list[Entry] = []
    # Of the context only the tokens count, not what the server says about them.
    for at in range(1, len(ids_T)):
        element, token = found[at], int(ids_T[at])
        if element and token not in element:
            raise _other_token(str(next(iter(element))), token, at)
        if at > start:
            if not element:
                raise _missing(at)
            entries.append(element[token])
    logprob = _checked([entry.logprob for entry in entries], ids_T, start)
    if any(entry.rank is None for entry in entries):
        return {LOGPROB.name: logprob, TOP1_BOUND.name: logprob > LN_HALF}
    return {LOGPROB.name: logprob, TOP1.name: np.array([entry.rank == 1 for entry in entries], bool)}


def from_echo(choice: Choice, ids_T: Ids, start: int) -> Row:
    """Scores of ids_T[start+1:]. Raises NotOffered (there are none), ModelError (not of these tokens).

    Where the server does not add the most probable token, whether it was this one is known above one half
    only.
    """
    found = choice.logprobs
    if found is None:
        raise NotOffered('no "logprobs" in the answer', "engine_error")
    if not found.tokens or not found.tokens[0].startswith("token_id:"):
        raise NotOffered(
            "tokens without their ids (return_tokens_as_token_ids) cannot be checked", "engine_error"
        )
    _check_count(min(len(found.tokens), len(found.token_logprobs), len(ids_T)), len(ids_T))
    logprobs: list[float] = []
    best: list[float] = []
    for at, token in enumerate(ids_T.tolist()):
        if found.tokens[at] != f"token_id:{token}":
            raise _other_token(found.tokens[at], token, at)
    for at in range(start + 1, len(ids_T)):
        value = found.token_logprobs[at]
        if value is None:
            raise _missing(at)
        logprobs.append(value)
        others = found.top_logprobs[at] if found.top_logprobs and at < len(found.top_logprobs) else None
        if others:
            best.append(max(others.values()))
    logprob = _checked(logprobs, ids_T, start)
    if len(best) < len(logprobs):
        return {LOGPROB.name: logprob, TOP1_BOUND.name: logprob > LN_HALF}
    return {LOGPROB.name: logprob, TOP1.name: np.asarray(logprobs) >= np.asarray(best)}


def top_of_prompt_logprobs(choice: Choice, ids_T: Ids, start: int) -> Row:
    """The most probable tokens at the places of ids_T[start+1:], and these themselves."""
    elements = (choice.prompt_logprobs or [])[start + 1 : len(ids_T)]
    return _top([{i: entry.logprob for i, entry in (element or {}).items()} for element in elements])


def top_of_echo(choice: Choice, ids_T: Ids, start: int) -> Row:
    """The most probable tokens at the places of ids_T[start+1:], and these themselves."""
    found = choice.logprobs
    assert found is not None, "read before"
    places = range(start + 1, len(ids_T))
    told = found.top_logprobs or []
    tops = [told[at] if at < len(told) else None for at in places]
    own = [{int(ids_T[at]): found.token_logprobs[at] or 0.0} for at in places]
    return _top([_by_id(top or {}) | mine for top, mine in zip(tops, own, strict=True)])


WAYS = (
    Way(
        "prompt_logprobs",
        {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True},
        from_prompt_logprobs,
        top_of_prompt_logprobs,
    ),
    Way(
        "echo",
        {"max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
        from_echo,
        top_of_echo,
    ),
)


def _by_id(tokens: dict[str, float]) -> dict[int, float]:
    """Those of "token_id:N" that are whole numbers."""
    pairs = ((name.removeprefix("token_id:"), value) for name, value in tokens.items())
    return {int(name): value for name, value in pairs if name.isdecimal() and len(name) < 10}


def _top(found: list[dict[int, float]]) -> Row:
    """Ids, -1 where a position has fewer than others, and log-probabilities."""
    width = max(map(len, found), default=0)
    ids = np.full((len(found), width), -1, np.int64)
    logprobs = np.full((len(found), width), np.nan)
    for row, tokens in enumerate(found):
        ids[row, : len(tokens)] = list(tokens)
        logprobs[row, : len(tokens)] = list(tokens.values())
    return {TOP_IDS: ids, TOP_LOGPROBS: np.where(logprobs <= MINUS_INFINITY, -np.inf, logprobs)}


def _check_count(n_found: int, n_tokens: int) -> None:
    if n_found != n_tokens:
        raise ModelError(f"the server returned {n_found} log-probabilities, not {n_tokens}", "engine_error")


def _missing(at: int) -> ModelError:
    return ModelError(f"the server returned no log-probability for position {at}", "engine_error")


def _other_token(found: str, token: int, at: int) -> ModelError:
    message = f"the server scored token {_whole(found)} where the window has {token} (position {at})"
    return ModelError(message, "engine_error")


def _whole(text: str, limit: int = 120) -> str:
    """A server's words, printable. Never cut: half a key would not be recognized."""
    shown = text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit else f"(a text of {len(text)} characters)"


def _checked(logprobs: list[float], ids_T: Ids, start: int) -> NDArray[np.float32]:
    """The targets' log-probabilities, float32 [R]; -inf and NaN stay, and are counted with the result."""
    values = np.asarray(logprobs, np.float64)
    wrong = np.flatnonzero(values > ROUNDING)
    if len(wrong):
        at = int(wrong[0])
        raise ModelError(
            f"the server gives token {int(ids_T[start + 1 + at])} at position {start + 1 + at} the "
            f"log-probability {logprobs[at]}",
            "engine_error",
            "vLLM has to run with --logprobs-mode raw_logprobs",
        )
    return np.where(values <= MINUS_INFINITY, -np.inf, values).astype(np.float32)
