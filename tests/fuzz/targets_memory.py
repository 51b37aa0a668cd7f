"""What `evalq memory` and `evalq plan` read: logs, config.json, headers of weights."""

import io
import itertools
import json
import math
import re
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cache_architectures import ARCHITECTURES, BASE
from fuzz.harness import Target
from fuzz.mutators import mutate_json, mutate_text
from rich.console import Console

from evalq.checkpoint.shape import read_shape
from evalq.checkpoint.shards import DTYPE_BITS
from evalq.vllm_memory import run_output
from evalq.vllm_memory.gpus import gpu_named
from evalq.vllm_memory.plan import PlanSettings, plan
from evalq.vllm_memory.plan_advice import advise
from evalq.vllm_memory.plan_output import print_plan
from evalq.vllm_memory.reader import read_logs

_ROOM = Path(__file__).parents[1] / "vllm_memory"
# Of every model so many layers and experts: the tensors of the others are like them.
_LAYERS, _EXPERTS = 4, 2


def _logs() -> list[bytes]:
    return [path.read_bytes() for path in sorted((_ROOM / "logs").glob("*.log"))]


def _read_log(data: bytes) -> None:
    """`evalq memory LOG` in each of its forms."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vllm.log"
        path.write_bytes(data)
        runs = read_logs([str(path)])
    run_output.print_runs(runs, Console(file=io.StringIO(), width=80, force_terminal=True))
    run_output.markdown(runs)
    run_output.as_csv(runs)
    json.loads(run_output.as_json(runs))


@cache
def _models() -> list[dict[str, Any]]:
    """The model shapes of the tests, cut down: {"config": {...}, "tensors": {name: [dtype, shape]}}."""
    found = []
    for path in sorted((_ROOM / "models").glob("*.json")):
        described = json.loads(path.read_text())
        limits = {key: _EXPERTS if "expert" in key else _LAYERS for key in described["ranges"]}
        ranges = {key: range(*ends)[: limits[key]] for key, ends in described["ranges"].items()}
        tensors = {}
        for template, dtype, shape in described["tensors"]:
            keys = re.findall(r"{(\w+)}", template)
            for numbers in itertools.product(*(ranges[key] for key in keys)):
                tensors[template.format(**dict(zip(keys, numbers, strict=True)))] = [dtype, shape]
        config = described["config"]
        text = config.get("text_config", config)
        text["num_hidden_layers"] = min(text["num_hidden_layers"], _LAYERS)
        found.append({"config": config, "tensors": tensors})
    return found + [_made_up(changes) for changes, _ in ARCHITECTURES]


def _made_up(changes: dict[str, Any]) -> dict[str, Any]:
    """A model of an architecture, with the few tensors that a plan looks at."""
    config = BASE | {"max_position_embeddings": 4096} | changes
    tensors = {"model.embed_tokens.weight": ["BF16", [1000, 2048]], "model.norm.weight": ["BF16", [2048]]}
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = ["BF16", [2048, 8192]]
    return {"config": config, "tensors": tensors}


def _whole_models() -> list[bytes]:
    return [json.dumps(model).encode() for model in _models()]


def _configs() -> list[bytes]:
    """Every config with the number of its model, whose headers stay whole."""
    return [json.dumps({"model": i} | model["config"]).encode() for i, model in enumerate(_models())]


def _plan_config(data: bytes) -> None:
    """A broken config.json beside whole headers."""
    models = _models()
    try:
        number = json.loads(data)["model"]
        tensors = models[number]["tensors"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        tensors = models[0]["tensors"]
    _plan(data, tensors)


def _plan_model(data: bytes) -> None:
    """A broken config.json, and headers of other names, types and shapes."""
    try:
        model = json.loads(data)
        config, tensors = json.dumps(model["config"]).encode(), dict(model["tensors"])
    except (ValueError, KeyError, TypeError, RecursionError):
        config, tensors = data, {}
    _plan(config, tensors)


def _plan(config: bytes, tensors: dict[str, Any]) -> None:
    """`evalq plan DIRECTORY` with some settings, as text and as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(config)
        _write_header(folder / "model.safetensors", tensors)
        shape = read_shape(name)
    gpu = gpu_named("H100")
    for settings in (
        PlanSettings(max_len=256),
        PlanSettings(tp=2, pp=2, kv_dtype="fp8", lora_rank=16, max_len=64, version=(0, 32)),
        PlanSettings(cpu_offload_gib=1.0),
    ):
        planned = plan(shape, gpu, settings)
    advice = advise(shape, gpu, settings, planned)
    print_plan(planned, advice, Console(file=io.StringIO(), width=80, force_terminal=True))
    json.dumps(planned.as_dict() | {"advice": advice.as_dict()})


def _write_header(path: Path, tensors: dict[str, Any]) -> None:
    """A header of the entries that can be understood, and a hole for the weights."""
    header, offset = {}, 0
    for name, entry in tensors.items():
        try:
            dtype, shape = entry
            assert len(shape) <= 16 and all(type(side) is int and 0 <= side < 2**40 for side in shape)
            size = math.prod(shape) * DTYPE_BITS[dtype] // 8
            assert size < 2**40
        except (ValueError, TypeError, KeyError, AssertionError):
            continue
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


TARGETS = (
    Target("vllm-log", _logs, _read_log, mutate_text),
    Target("plan-config", _configs, _plan_config, mutate_json),
    Target("plan-model", _whole_models, _plan_model, mutate_json),
)
