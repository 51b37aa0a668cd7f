"""Can this model be fed this text? Asked before anything is scored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evalq.data.tokens import TokenStream
from evalq.data.windows import WindowPlan
from evalq.engine.backend import Backend, Batch, LoadedModel, Scores
from evalq.engine.columns import REFERENCE_LOGPROB, REFERENCE_ROWS, Column
from evalq.errors import ModelError
from evalq.results.kept import KeptInputs


def check_positions(max_positions: int | None, plan: WindowPlan) -> None:
    """Raise ModelError if a window has more inputs than the model has positions.

    The last token of a window is a target only, so T - 1 positions are enough.
    """
    inputs = plan.longest_tokens - 1
    if max_positions is not None and inputs > max_positions:
        raise ModelError(
            f"a window has {inputs} tokens, the model has {max_positions} positions",
            "window_too_long",
            f"set eval_len to {max_positions} or less in the data spec or with --eval-len",
        )


def check_model(model: LoadedModel, stream: TokenStream, plan: WindowPlan) -> None:
    """Raise ModelError unless this model can be fed this stream: positions, vocabulary, tokenizer."""
    check_positions(model.max_positions, plan)
    check_tokens(model, stream, plan.prefix)


def check_tokens(model: LoadedModel, stream: TokenStream, prefix: Sequence[int] = ()) -> None:
    """Raise ModelError unless these are tokens of this model's own: vocabulary, tokenizer."""
    for what, ids in (("the text", stream.ids_N), ("what goes before every window", np.array(prefix))):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab_size:
            wrong = int(ids.max()) if ids.min() >= 0 else int(ids.min())
            raise ModelError(
                f"{what} has token id {wrong}, the model's vocabulary has {model.vocab_size}",
                "tokenizer_mismatch",
            )
    if model.tokenize is None:
        return
    mine = model.tokenize(stream.probe_text)
    theirs = list(stream.probe_ids)
    if mine != theirs:
        at = next(
            (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(mine), len(theirs)),
        )
        raise ModelError(
            f"the model's own tokenizer gives other ids than the data spec's from token {at} on: "
            f"{mine[at : at + 5]} and {theirs[at : at + 5]}",
            "tokenizer_mismatch",
        )


def given_columns(backend: Backend, model: LoadedModel, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted columns that this model gives; the bound of one where it gives only that.

    Raises:
        ModelError: the first wanted column, without which there is no perplexity, is not among them.
    """
    declared = {column.name: column for column in backend.columns}
    offered = [name for name in model.columns or tuple(declared) if name in declared]
    found = [_offered(name, offered, declared) for name in wanted]
    if wanted and found[0] is None:
        raise ModelError(f"this engine gives no {wanted[0]}", "unsupported_format")
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _offered(name: str, offered: Sequence[str], declared: Mapping[str, Column]) -> str | None:
    if name in offered:
        return name
    bound = declared[name].bound if name in declared else None
    return bound if bound in offered else None


def check_scores(scores: Scores, batch: Batch, declared: Mapping[str, Column]) -> Scores:
    """The columns asked for, in the dtypes they are kept in.

    Raises:
        ModelError: one is missing, or has another shape.
    """
    kept: Scores = {}
    for name in batch.columns:
        if name not in scores:
            raise ModelError(f"the backend returned no {name}", "engine_error")
        if name == REFERENCE_ROWS:  # a row a token, not a number
            kept[name] = _rows(scores[name], batch)
            continue
        shape = np.shape(scores[name])
        if shape != batch.shape:
            raise ModelError(
                f"the backend returned {name} of shape {shape}, not {batch.shape}", "engine_error"
            )
        kept[name] = np.asarray(scores[name], declared[name].dtype)
    return kept


def _rows(rows: Any, batch: Batch) -> Any:
    """Rows of a reference. Raises ModelError."""
    if np.ndim(rows) != 3 or np.shape(rows)[:2] != batch.shape:
        wanted = (*batch.shape, "d")
        message = f"the backend returned {REFERENCE_ROWS} of shape {np.shape(rows)}, not {wanted}"
        raise ModelError(message, "engine_error")
    return rows


# Rounding of a head that multiplies in 16 bits moves a token's log-probability by some hundredths of a nat,
# in both directions; another head, scale or soft cap by far more.
_REFERENCE_MOVES_MAX_NATS = 0.1


def check_reference(scores: Scores, batch: Batch) -> None:
    """Raise ModelError unless the reference's distributions were made again as its own engine had them.

    Its log-probabilities of the text, made again from its kept rows, are compared with those it was scored
    with.
    """
    if REFERENCE_LOGPROB.name not in scores or not isinstance(batch.inputs, KeptInputs):
        return
    was = batch.inputs.logprob().astype(np.float64)
    moved = np.abs(scores[REFERENCE_LOGPROB.name] - was)[np.isfinite(was)]
    if moved.size and not float(moved.mean()) <= _REFERENCE_MOVES_MAX_NATS:
        raise ModelError(
            f"the reference's log-probabilities, made again from what was kept, differ by {moved.mean():.3f} "
            "nats a token from its own",
            "engine_error",
            "score the reference again with --clear_cache; if that does not help, take another reference",
        )
