"""Continuing prompts in ExLlamaV3: its own dynamic generator, a job for each prompt.

The generator runs the whole model, head included, through a cache that has to be there before the model is
loaded. It keeps the pages of prompts that it has seen, so a prompt that comes again is not read again.

Source: `exllamav3/generator/` of https://github.com/turboderp-org/exllamav3
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evalq.backends._exl3_cache import PAGE_TOKENS, PLAIN, types_of
from evalq.engine.backend import Generated, Ids, LoadRequest
from evalq.errors import ModelError

_SEQUENCES_LEAST = 16  # exllamav3's default


@dataclass
class Generation:
    """What continuing prompts needs.

    Args:
        cache: exllamav3's, for all prompts at once.
        modules: that the whole model runs, in order.
        most_prompts: at once.
        tokens_each: of a prompt with its new tokens.
        generator: exllamav3's, made when it is first needed.
    """

    cache: Any
    modules: list[Any]
    most_prompts: int
    tokens_each: int
    generator: Any = None


def room_for(model: Any, request: LoadRequest) -> Generation | None:
    """A cache for a model that is about to be loaded; None where nothing is to be generated.

    Args:
        model: exllamav3's, whose forward() still includes the head.
        request: its prompts, their lengths, and the types of the cache among its options.

    Raises:
        ModelError: bad_option.
    """
    if not request.generate:
        return None
    if request.options.get("streaming"):
        message = "streaming keeps one module at a time and no KV cache, so exl3 does not generate"
        raise ModelError(message, "bad_option", "remove streaming")
    from exllamav3 import Cache, CacheLayer_fp16, CacheLayer_quant

    tokens = request.prompt_tokens + request.new_tokens
    # The generator takes whole pages, and one more for the token that it is about to make.
    room = (-(-tokens // PAGE_TOKENS) + 1) * PAGE_TOKENS
    types = types_of(request.options) or PLAIN
    kind: dict[str, Any] = {"layer_type": CacheLayer_fp16}
    if types.quantized:
        kind = {"layer_type": CacheLayer_quant, "k_bits": int(types.k), "v_bits": int(types.v)}
    most = max(_SEQUENCES_LEAST, request.generate)
    cache = Cache(model, request.generate * room, max_batch_size=most, **kind)
    return Generation(cache, list(model.fwd_modules), request.generate, tokens)


def generate(
    model: Any, room: Generation, prompts: Sequence[Ids], new_tokens: int, stop_ids: frozenset[int]
) -> Generated:
    """As `Backend.generate`.

    Args:
        model: exllamav3's, loaded.
        room: made for it.
        prompts: as in `Backend.generate`.
        new_tokens: likewise.
        stop_ids: likewise.

    Raises:
        ModelError: window_too_long, bad_option: more than there is room for.
    """
    import torch

    needed = max(map(len, prompts), default=0) + new_tokens
    if needed > room.tokens_each or len(prompts) > room.most_prompts:
        raise ModelError(
            f"{len(prompts)} prompts of {needed} tokens with their new ones, there is room for "
            f"{room.most_prompts} of {room.tokens_each}",
            "window_too_long",
        )
    without_head = model.fwd_modules
    model.fwd_modules = room.modules
    try:
        if room.generator is None:
            room.generator = _generator(model, room)
        return _generated(room.generator, prompts, new_tokens, stop_ids)
    finally:
        torch.cuda.synchronize()
        model.fwd_modules = without_head


def _generator(model: Any, room: Generation) -> Any:
    from exllamav3 import Generator, Tokenizer

    tokenizer = Tokenizer.from_config(model.config)
    return Generator(model, room.cache, tokenizer, max_batch_size=room.most_prompts)


def _generated(
    generator: Any, prompts: Sequence[Ids], new_tokens: int, stop_ids: frozenset[int]
) -> Generated:
    import torch
    from exllamav3 import Job
    from exllamav3.generator.sampler import ArgmaxSampler

    began = time.perf_counter()
    jobs = [
        Job(
            input_ids=torch.from_numpy(np.ascontiguousarray(prompt))[None],
            max_new_tokens=new_tokens,
            sampler=ArgmaxSampler(),
            stop_conditions=sorted(stop_ids) or None,
        )
        for prompt in prompts
    ]
    serials = {generator.enqueue(job): row for row, job in enumerate(jobs)}
    waiting, first = set(serials), 0.0
    while generator.num_remaining_jobs():
        for result in generator.iterate():
            if result["stage"] == "error":
                raise result["error"]
            if result["stage"] == "streaming":
                waiting.discard(result["serial"])
        if not waiting and not first:
            first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    # What a job has accepted: with the stop token, which its results leave out.
    whole = [job.sequences[0].sequence_ids.torch()[0].cpu().numpy() for job in jobs]
    ids = [np.array(every[len(prompt) :], np.int64) for every, prompt in zip(whole, prompts, strict=True)]
    return Generated(ids, first or seconds, seconds)
