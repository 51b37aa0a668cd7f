"""Continuing prompts in vLLM: each a request of its own, the most probable token each time."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalq.engine.backend import Generated, Ids
from evalq.errors import ModelError


@dataclass(frozen=True)
class Wanted:
    """What is asked of every prompt.

    Args:
        new_tokens: at most so many.
        stop_ids: tokens after which it ends.
        numbers: names of requests, no two alike.
        lora: vllm.LoRARequest, or None.
    """

    new_tokens: int
    stop_ids: frozenset[int]
    numbers: Iterator[int]
    lora: Any = None


def generate(engine: Any, prompts: Sequence[Ids], wanted: Wanted) -> Generated:
    """Greedy continuations, as `Backend.generate`. Raises ModelError (engine_error).

    Args:
        engine: vllm's LLMEngine with nothing else under way.
        prompts: int64 [N] of each.
        wanted: of every one of them.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # ignore_eos leaves out the end tokens of the checkpoint's own settings; those asked for still count.
    settings = SamplingParams(
        temperature=0.0,
        max_tokens=wanted.new_tokens,
        ignore_eos=True,
        stop_token_ids=sorted(wanted.stop_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    names = [str(next(wanted.numbers)) for _ in prompts]
    found: dict[str, list[int]] = {name: [] for name in names}
    waiting, first = set(names), 0.0
    began = time.perf_counter()
    try:
        for name, ids_N in zip(names, prompts, strict=True):
            engine.add_request(name, prompt_of(engine, ids_N), settings, lora_request=wanted.lora)
        unfinished = set(names)
        while unfinished:
            if not engine.has_unfinished_requests():
                raise ModelError("vLLM dropped a prompt without an answer", "engine_error")
            for output in engine.step():
                found[output.request_id].extend(output.outputs[0].token_ids)
                if output.outputs[0].token_ids:
                    waiting.discard(output.request_id)
                if output.finished:
                    unfinished.discard(output.request_id)
            if not waiting and not first:
                first = time.perf_counter() - began
        seconds = time.perf_counter() - began
    except BaseException:
        engine.abort_request(names)
        raise
    return Generated([np.array(found[name], np.int64) for name in names], first or seconds, seconds)


def prompt_of(engine: Any, ids_T: Ids) -> Any:
    """Ids in the form this version wants them: newer ones deprecate plain prompts."""
    prompt = {"prompt_token_ids": ids_T.tolist()}
    render = getattr(getattr(engine, "renderer", None), "render_cmpl", None)
    return prompt if render is None else render([prompt])[0]
