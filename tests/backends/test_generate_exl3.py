"""Continuing prompts in exllamav3: on a toy generator, and on the real engine (`pytest -m gpu`)."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_backend_exl3 import EXL3, checkpoint, engine

from evalq.backends import _exl3_generate
from evalq.backends._exl3_generate import Generation, generate, room_for
from evalq.engine.backend import LoadRequest
from evalq.errors import ModelError

__all__ = ["checkpoint"]  # a fixture


class ToyJob:
    """A job as exllamav3 keeps it: what it accepts goes behind its prompt."""

    def __init__(self, input_ids: Any, max_new_tokens: int, sampler: Any, stop_conditions: Any) -> None:
        assert input_ids.shape[0] == 1 and input_ids.dtype == torch.int64
        self.ids, self.left, self.stop = input_ids, max_new_tokens, stop_conditions or []
        self.sequences = [types.SimpleNamespace(sequence_ids=types.SimpleNamespace(torch=lambda: self.ids))]

    def step(self) -> bool:
        token = int(self.ids.sum()) % 50
        self.ids = torch.cat([self.ids, torch.tensor([[token]])], dim=1)
        self.left -= 1
        return not self.left or token in self.stop


class ToyGenerator:
    """Reads a prompt in one iteration, then gives a token of every job in each."""

    def __init__(self) -> None:
        self.jobs: dict[int, ToyJob] = {}
        self.ready: set[int] = set()

    def enqueue(self, job: ToyJob) -> int:
        self.jobs[len(self.jobs)] = job
        return len(self.jobs) - 1

    def num_remaining_jobs(self) -> int:
        return len(self.jobs)

    def iterate(self) -> Iterator[dict[str, Any]]:
        for serial in list(self.jobs):
            if serial not in self.ready:
                self.ready.add(serial)
                yield {"stage": "prefill", "serial": serial, "eos": False}
                continue
            done = self.jobs[serial].step()
            if done:
                del self.jobs[serial]
            yield {"stage": "streaming", "serial": serial, "eos": done}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Generation:
    package, sampler = types.ModuleType("exllamav3"), types.ModuleType("exllamav3.generator.sampler")
    package.Job, sampler.ArgmaxSampler = ToyJob, object  # type: ignore[attr-defined]
    for module in (package, types.ModuleType("exllamav3.generator"), sampler):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_exl3_generate, "_generator", lambda model, room: ToyGenerator())
    return Generation(cache=None, modules=["body", "head"], most_prompts=2, tokens_each=20)


def test_ids_are_what_each_job_accepted_its_stop_token_included(room: Generation) -> None:
    model = types.SimpleNamespace(fwd_modules=["body"])
    prompts = [np.array([3, 4, 5]), np.array([7])]
    found = generate(model, room, prompts, 6, frozenset({24}))
    assert [ids.tolist() for ids in found.ids] == [[12, 24], [7, 14, 28, 6, 12, 24]]
    assert model.fwd_modules == ["body"]
    assert 0 < found.first_token_seconds <= found.seconds


def test_more_than_there_is_room_for_is_refused(room: Generation) -> None:
    model = types.SimpleNamespace(fwd_modules=["body"])
    with pytest.raises(ModelError, match="there is room for 2 of 20"):
        generate(model, room, [np.arange(15)], 6, frozenset())
    with pytest.raises(ModelError, match="3 prompts of 7 tokens"):
        generate(model, room, [np.array([1])] * 3, 6, frozenset())


def test_streaming_does_not_generate() -> None:
    asked = LoadRequest(Path("m"), 16, 15, {"streaming": True}, generate=1, prompt_tokens=4, new_tokens=4)
    with pytest.raises(ModelError, match="exl3 does not generate") as caught:
        room_for(None, asked)
    assert caught.value.category == "bad_option"


class TestEngine:
    pytestmark = engine

    def test_ids_are_the_most_probable_ones_of_whole_passes(self, checkpoint: Path) -> None:
        prompts = [np.arange(200, 230), np.arange(500, 540)]
        asked = LoadRequest(checkpoint, 64, 63, {}, generate=2, prompt_tokens=40, new_tokens=8)
        model = EXL3.load(asked)
        found = EXL3.generate(model, prompts, 8)
        handle = model.handle
        for prompt, ids in zip(prompts, found.ids, strict=True):
            whole = torch.from_numpy(np.concatenate([prompt, ids]))[None]
            hidden = handle.model.forward(whole, {"attn_mode": "flash_attn_nc"})
            logits = handle.head.forward(hidden, {"reconstruct": True}, out_dtype=torch.float)
            rows = logits[0, len(prompt) - 1 : -1, : model.vocab_size]
            chosen = rows.gather(-1, torch.from_numpy(ids)[:, None].to(rows.device))[:, 0]
            # With few rows the engine multiplies in another way: a near tie may fall the other way.
            assert bool((rows.amax(-1) - chosen < 0.2).all())
        assert EXL3.generate(model, prompts[:1], 8, frozenset({int(found.ids[0][2])})).ids[0].size <= 3
        EXL3.close(model)
