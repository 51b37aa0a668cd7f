"""The first words with a server: which model it serves, which version it is, which way it scores.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import numpy as np

from evalq.backends._server_client import Client, NotOffered
from evalq.backends._server_scores import (
    WAYS,
    Answer,
    Ids,
    ModelCard,
    ModelList,
    Version,
    Way,
    parsed,
)
from evalq.backends._vllm_scores import Row
from evalq.engine.columns import KEPT_MASS, KLD_BOUND, REFERENCE_LOGPROB
from evalq.errors import ModelError

# Any ids will do: the first question is whether there is an answer.
PROBE_IDS = np.arange(1, 5, dtype=np.int64)
LIST_BYTES_MAX = 2**20
# About a hundred bytes of JSON per token are usual; the text of a token may be long.
BYTES_PER_TOKEN = 2048
BYTES_PER_ENTRY = 512
UNKNOWN_VERSION = "the server does not tell its version: a result is not told apart from another version's"


@dataclass(frozen=True)
class Served:
    """A model at a server.

    Args:
        name: to ask for it by.
        names: all of its names, of which answers carry one.
        card: what the server lists about it.
        way: how to ask for log-probabilities.
        columns: names of those that its answers hold.
        fingerprint: of the server's configuration, equal in every answer; None where it gives none.
        versions: what the numbers depend on there, the engine first.
        notes: what a reader of the result should know.
    """

    name: str
    names: frozenset[str]
    card: ModelCard
    way: Way
    columns: tuple[str, ...]
    fingerprint: str | None
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_served(client: Client) -> Served:
    """The model that the options name, at a server that scores prompts. Raises ModelError."""
    cards = _list(client)
    card = _choose(client, cards)
    # With several names for one model, vLLM answers with the first.
    names = {other.id for other in cards if other.root is not None and other.root == card.root} | {card.id}
    way, columns, fingerprint = _find_way(client, card.id)
    version = _version(client)
    engine = "vllm" if card.owned_by == "vllm" else "server"
    versions = {engine: version or "unknown", "served_model": client.shown(card.id)}
    if fingerprint is not None:
        versions["fingerprint"] = client.shown(fingerprint)
    notes = [] if version or fingerprint else [UNKNOWN_VERSION]
    if card.parent is not None:
        notes.append(f"the server puts the adapter {client.shown(card.id)} on {client.shown(card.parent)}")
    return Served(card.id, frozenset(names), card, way, columns, fingerprint, versions, tuple(notes))


def with_top(client: Client, served: Served, top_k: int) -> Served:
    """The same model, asked for its most probable tokens too. Raises ModelError where that is too many."""
    way = served.way.with_top(top_k)
    try:
        _ask(client, way, served.name, PROBE_IDS, 0, Event())
    except NotOffered as error:
        raise ModelError(
            f"the server gives no {top_k} most probable tokens of a position: {error.message}",
            "bad_option",
            f'start vLLM with --max-logprobs {top_k}, or set "top_k" lower in the options',
        ) from None
    columns = (*served.columns, KLD_BOUND.name, KEPT_MASS.name, REFERENCE_LOGPROB.name)
    note = (
        f"KL divergence is a lower bound: the server's {top_k} most probable tokens each for itself, "
        "all others as one"
    )
    return replace(served, way=way, columns=columns, notes=(*served.notes, note))


def score(client: Client, served: Served, ids_T: Ids, start: int, stop: Event) -> Row:
    """Scores of the targets ids_T[start+1:] of one window.

    Raises:
        ModelError: the server failed, or answered for another model or other ids.
    """
    answer, scores = _ask(client, served.way, served.name, ids_T, start, stop)
    if answer.model not in served.names:
        raise ModelError(
            f'asked for the model "{client.shown(served.name)}", the server answered with '
            f'"{client.shown(answer.model)}"',
            "engine_error",
        )
    if answer.system_fingerprint != served.fingerprint:
        raise ModelError(
            f"another engine answers now: its fingerprint is {client.shown(str(answer.system_fingerprint))}, "
            f"that of the first answer {client.shown(str(served.fingerprint))}",
            "engine_error",
            "run again: a server that was started anew with other settings is scored anew",
        )
    return scores


def serves_elsewhere(root: str, path: Path) -> bool:
    """Whether what the server says it loaded has another name than the checkpoint at `path`."""
    cached = "models--" + root.replace("/", "--")  # the hub's folder for owner/name
    return Path(root).name != path.name and cached not in path.parts


def _ask(client: Client, way: Way, model: str, ids_T: Ids, start: int, stop: Event) -> tuple[Answer, Row]:
    url = f"{client.settings.base_url}/completions"
    ids = ids_T.tolist()
    body = {"model": model, "prompt": ids, "temperature": 0, **way.asks}
    bytes_per_token = BYTES_PER_TOKEN + BYTES_PER_ENTRY * way.top_k
    content = client.post(url, body, bytes_per_token * (len(ids) + 32), stop)
    answer = parsed(Answer, content, url)
    if len(answer.choices) != 1:
        raise ModelError(f"the server returned {len(answer.choices)} choices, not 1", "engine_error")
    choice = answer.choices[0]
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != ids:
        raise ModelError("the server scored other ids than those of the window", "engine_error")
    row = way.read(choice, ids_T, start)
    return answer, row | way.read_top(choice, ids_T, start) if way.top_k else row


def _list(client: Client) -> list[ModelCard]:
    url = f"{client.settings.base_url}/models"
    try:
        cards: list[ModelCard] = parsed(ModelList, client.get(url, LIST_BYTES_MAX), url).data
    except NotOffered as error:
        remedy = "base_url should name a server like vLLM's, up to and with /v1"
        raise ModelError(error.message, "bad_option", remedy) from None
    return cards


def _choose(client: Client, cards: list[ModelCard]) -> ModelCard:
    """The model that the options name, or the only one, which may have several names."""
    name = client.settings.model
    listed = ", ".join(f'"{client.shown(card.id)}"' for card in cards[:20]) or "none"
    found = [card for card in cards if name in (None, card.id)]
    if len({card.root or card.id for card in found}) == 1:
        return found[0]
    if name is None:
        problem = f"the server lists {len(cards)} models: {listed}"
        raise ModelError(problem, "bad_option", 'name one as "model" in the options')
    raise ModelError(f'the server has no model "{client.shown(name)}"', "model_missing", f"it lists {listed}")


def _version(client: Client) -> str | None:
    """GET /version, which vLLM has beside /v1; None from a server without one."""
    url = client.settings.base_url.removesuffix("/v1") + "/version"
    try:
        found: Version = parsed(Version, client.get(url, LIST_BYTES_MAX), url)
    except NotOffered:
        return None
    return client.shown(found.version)


def _find_way(client: Client, model: str) -> tuple[Way, tuple[str, ...], str | None]:
    """The first way that this server offers, the columns it gives, and the server's fingerprint."""
    reasons = []
    for way in WAYS:
        try:
            answer, row = _ask(client, way, model, PROBE_IDS, 0, Event())
        except NotOffered as error:
            reasons.append(f"{way.name}: {error.message}")
            continue
        return way, tuple(row), answer.system_fingerprint
    raise ModelError(
        f"{client.settings.base_url} gives no log-probabilities of a prompt ({'; '.join(reasons)})",
        "engine_error",
        'take a vLLM server; llama-server has none, score its file with "load_fn": "gguf"',
    )
