"""Continuing prompts in vLLM: what the engine is told, and the real one's ids on a CPU."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from vllm_runs import PYTHON, engine

from evalq.backends import hf, vllm
from evalq.backends._vllm_options import OPTIONS, Hardware, engine_arguments
from evalq.engine.backend import LoadRequest
from evalq.errors import ModelError

CPU = Hardware(True, 1, 16 * 2**30, "x86_64", None)
H200 = Hardware(False, 2, 140 * 2**30, "NVIDIA H200", (9, 0))
KNOWN = set(OPTIONS) | {"model", "enable_prefix_caching", "skip_tokenizer_init", "max_num_seqs"}
REQUEST = LoadRequest(Path("m"), 512, 511, {}, generate=32, prompt_tokens=512, new_tokens=128)


def arguments(request: LoadRequest, hardware: Hardware = H200) -> dict[str, Any]:
    return engine_arguments(request, hardware, 128_256, KNOWN, "0.32.0")


def test_a_model_that_only_generates_is_set_up_as_it_serves() -> None:
    found = arguments(replace(REQUEST, n_windows=0))
    assert (found["max_model_len"], found["max_num_seqs"]) == (640, 32)
    assert found["enforce_eager"] is False and found["enable_prefix_caching"] is False
    assert "max_num_batched_tokens" not in found and "gpu_memory_utilization" not in found
    assert arguments(replace(REQUEST, n_windows=0), CPU)["enforce_eager"] is True
    own = replace(REQUEST, n_windows=0, options={"enforce_eager": True, "max_num_seqs": 8})
    assert arguments(own)["enforce_eager"] is True and arguments(own)["max_num_seqs"] == 8
    with pytest.raises(ModelError, match="this machine has 2 GPUs"):
        arguments(replace(REQUEST, n_windows=0, options={"tensor_parallel_size": 4}))


def test_room_for_generating_changes_no_step_of_scoring() -> None:
    plain, both = arguments(replace(REQUEST, generate=0, prompt_tokens=0, new_tokens=0)), arguments(REQUEST)
    assert (plain["max_model_len"], both["max_model_len"]) == (513, 640)
    assert (plain["max_num_seqs"], both["max_num_seqs"]) == (32, 32)
    for name in ("max_num_batched_tokens", "enforce_eager", "gpu_memory_utilization"):
        assert plain[name] == both[name]


def test_prompts_longer_than_the_positions_fail_before_the_engine_starts(tiny: Path) -> None:
    (tiny / "config.json").write_text('{"max_position_embeddings": 100}')
    for n_windows in (0, 1):
        asked = LoadRequest(
            tiny, 50, 49, {}, n_windows=n_windows, generate=1, prompt_tokens=90, new_tokens=12
        )
        with pytest.raises(ModelError, match="101 positions, the model has 100") as caught:
            vllm.VllmBackend().load(asked)
        assert caught.value.category == "window_too_long"


SCRIPT = """
import json, sys
import numpy as np
from pathlib import Path
from evalq.backends.vllm import VllmBackend
from evalq.engine.backend import LoadRequest

def main():
    asked = json.loads(sys.argv[1])
    prompts = [np.array(ids) for ids in asked["prompts"]]
    longest = max(map(len, prompts))
    backend = VllmBackend()
    model = backend.load(LoadRequest(
        Path(asked["path"]), 64, 63, {"dtype": "float32"}, n_windows=0,
        generate=2, prompt_tokens=longest, new_tokens=8,
    ))
    found = backend.generate(model, prompts, 8)
    stopped = backend.generate(model, prompts, 8, frozenset(asked["stop"]))
    try:
        backend.generate(model, [np.arange(longest + 1)], 8)
        refused = ""
    except Exception as error:
        refused = str(error)
    told = {"ids": [ids.tolist() for ids in found.ids], "stopped": [ids.tolist() for ids in stopped.ids]}
    print(json.dumps(told | {"first": found.first_token_seconds, "all": found.seconds, "refused": refused}))
    backend.close(model)

main()
"""


@engine
def test_ids_are_those_of_transformers(smollm2: Callable[[str], Path]) -> None:
    texts = ["The capital of France is", "Once upon a time there was a little girl who", "def fib(n):"]
    tokenizer = hf.load_tokenizer(smollm2("bf16"))
    prompts = [tokenizer.encode(text, False) for text in texts]
    model = hf.HfBackend().load(LoadRequest(smollm2("bf16"), 64, 63, {"dtype": "float32", "device": "cpu"}))
    want = [ids.tolist() for ids in hf.HfBackend().generate(model, list(map(np.array, prompts)), 8).ids]
    asked = {"path": str(smollm2("bf16")), "prompts": prompts, "stop": [want[0][2]]}
    command = [str(PYTHON), "-c", SCRIPT, json.dumps(asked)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["ids"] == want
    assert found["stopped"][0] == want[0][: want[0].index(want[0][2]) + 1]
    assert 0 < found["first"] <= found["all"]
    assert "vLLM was started for" in found["refused"]
