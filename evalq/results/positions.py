"""The scored tokens on which a model differs most from the reference, and where they lie in the text.

Nothing is scored for it: the store holds every token's numbers, the windows they were made in, and the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalq.data.tokens import TokenStream, cut, read_stream
from evalq.engine.backend import Ids
from evalq.engine.columns import ARGMAX, KLD, LOGPROB
from evalq.errors import StoreError
from evalq.results.record import ResultRecord
from evalq.results.store import Store
from evalq.results.tokens import TokenColumns

By = Literal["kld", "delta_p", "ln_ratio"]
Floats = NDArray[np.float64]
CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class Position:
    """One scored token, p by the reference and q by the model.

    Args:
        position: of the token in its stream, from 0.
        window: in which it was scored, from 0.
        token: its id.
        before: ids before it in its window, the last few.
        p: its probability by the reference.
        q: its probability by the model.
        kld: sum p (ln p - ln q) over the vocabulary, nats; None where it was not measured.
        ln_ratio: ln p - ln q of this token, nats.
        reference_guess: id of the reference's most probable token; None where it was not kept.
        model_guess: of the model's.
    """

    position: int
    window: int
    token: int
    before: tuple[int, ...]
    p: float
    q: float
    kld: float | None
    ln_ratio: float
    reference_guess: int | None
    model_guess: int | None

    @property
    def delta_p(self) -> float:
        """How much more probable the model finds it."""
        return self.q - self.p


def most_diverging(
    mine: TokenColumns, theirs: TokenColumns, ids_N: Ids, by: By, count: int
) -> list[Position]:
    """The tokens of which a quantity is largest, the largest first.

    By delta p and the ln ratio the largest to either side. A token that is scored in several windows is
    there once, in the window where it differs most. What is NaN is left out.

    Args:
        mine: of the model; columns beside the reference under their plain names.
        theirs: of the reference, on the same tokens.
        ids_N: the stream.
        by: the quantity.
        count: at most so many.

    Raises:
        StoreError: the results do not say where their windows lie, or hold other tokens.
    """
    places = _places(mine)
    if theirs.window_of.size != places.size or places.max(initial=-1) >= len(ids_N):
        raise StoreError("the two results hold other tokens", "run the comparison again")
    ln_q, ln_p = (found.columns[LOGPROB.name].astype(np.float64) for found in (mine, theirs))
    size = _sizes(mine, ln_p, ln_q, by)
    found: dict[int, Position] = {}
    for index in np.argsort(-size, kind="stable").tolist():
        place = int(places[index])
        if len(found) == count or np.isnan(size[index]):
            break
        if place not in found:
            found[place] = _position(mine, theirs, ids_N, index, place)
    return list(found.values())


def stream_of(record: ResultRecord, store: Store) -> TokenStream:
    """The tokens that a record was scored on. Raises StoreError where the store does not hold them."""
    wanted, count = record.comparison.get("tokens_sha256"), record.comparison.get("tokens")
    for file in sorted((store.root / "tokens").glob("*.safetensors")):
        whole = read_stream(file)
        if whole is not None and isinstance(count, int) and count <= len(whole.ids_N):
            stream = cut(whole, count)
            if stream.sha256 == wanted:
                return stream
    raise StoreError(
        f'the store {store.root} does not hold the tokens of "{record.label}"',
        "run the comparison again, which makes them anew",
    )


def _places(found: TokenColumns) -> NDArray[np.int64]:
    """Position in the stream of each scored token, int64 [n]."""
    if found.windows is None:
        raise StoreError(
            "a result of evalq 0.1, which did not keep where its windows lie", "run the comparison again"
        )
    ends, score_from = found.windows[:, 1], found.windows[:, 2]
    n_targets = ends - score_from
    window_of = np.repeat(np.arange(len(n_targets)), n_targets)
    if not np.array_equal(found.window_of, found.of_these(window_of)):
        raise StoreError("a result whose windows contradict its tokens", "score it again with -cc")
    first = np.cumsum(n_targets) - n_targets
    return found.of_these(np.arange(window_of.size) - (first - score_from)[window_of])


def _sizes(mine: TokenColumns, ln_p: Floats, ln_q: Floats, by: By) -> Floats:
    if by == "kld":
        return mine.columns[KLD.name].astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: neither finds it possible
        return np.abs(np.exp(ln_q) - np.exp(ln_p)) if by == "delta_p" else np.abs(ln_p - ln_q)


def _position(mine: TokenColumns, theirs: TokenColumns, ids_N: Ids, index: int, place: int) -> Position:
    assert mine.windows is not None, "places are known only with windows"
    window = int(mine.window_of[index])
    start = max(int(mine.windows[window, 0]), place - CONTEXT_TOKENS)
    ln_q, ln_p = float(mine.columns[LOGPROB.name][index]), float(theirs.columns[LOGPROB.name][index])
    kld = mine.columns.get(KLD.name)
    return Position(
        position=place,
        window=window,
        token=int(ids_N[place]),
        before=tuple(int(i) for i in ids_N[start:place]),
        p=float(np.exp(ln_p)),
        q=float(np.exp(ln_q)),
        kld=None if kld is None else float(kld[index]),
        ln_ratio=ln_p - ln_q,
        reference_guess=_guess(theirs.columns.get(ARGMAX.name), index),
        model_guess=_guess(mine.columns.get(ARGMAX.name), index),
    )


def _guess(column: NDArray[Any] | None, index: int) -> int | None:
    return None if column is None else int(column[index])


def quantities(mine: TokenColumns) -> Sequence[By]:
    """What positions can be ordered by, the sharpest first."""
    return ("kld", "delta_p", "ln_ratio") if KLD.name in mine.columns else ("delta_p", "ln_ratio")
