"""The planner against measured vLLM runs: `python benchmarks/memory_plan.py` prints the tables of the docs.

Model shapes are config files and the names, dtypes and shapes of tensors in tests/vllm_memory/models; the
weights themselves are not needed. Measurements are GiB as vLLM logs them, so they are rounded to 0.01.
"""

import itertools
import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from evalq.checkpoint.shape import ModelShape, make_shape
from evalq.checkpoint.shards import DTYPE_BITS, RawTensor
from evalq.vllm_memory.gpus import PlannedGpu, gpu_named
from evalq.vllm_memory.plan import PlanSettings, plan
from evalq.vllm_memory.plan_result import VllmPlan

MODELS = Path(__file__).parents[1] / "tests" / "vllm_memory" / "models"
H100, H200, A100 = gpu_named("H100"), gpu_named("H200"), gpu_named("A100-40GB")
# The run does not say which; 14.6 to 16.0 GiB give the same verdicts.
GPU_16 = PlannedGpu("16 GB GPU", 15.6)
LLAMA_70B = "Llama-3.3-70B-Instruct-FP8-dynamic"
QWEN_NEXT = "Qwen3-Next-80B-A3B-Instruct-FP8"
SORTS = PlanSettings(max_len=16000, version=(0, 11))
HALF = PlanSettings(max_len=2064, utilization=0.5, eager=True, version=(0, 26))


@dataclass(frozen=True)
class Measured:
    """One run that reported its memory, GiB per GPU; None where it did not."""

    model: str
    gpu: PlannedGpu
    settings: PlanSettings
    weights: float | None
    activation: float | None
    non_torch: float | None
    kv: float
    kv_tokens: int | None = None


@dataclass(frozen=True)
class Outcome:
    """One run and what came of it."""

    model: str
    gpu: PlannedGpu
    settings: PlanSettings
    happened: str
    status: str


MEASURED = (
    Measured("gpt-oss-20b", H100, SORTS, 13.47, 7.38, 0.13, 50.28),
    Measured(LLAMA_70B, H100, replace(SORTS, tp=2), 33.88, 4.84, 0.55, 32.0),
    Measured(LLAMA_70B, H100, SORTS, 67.72, 4.84, 0.14, -1.44),
    Measured("Llama-3.1-8B-Instruct", H100, SORTS, 14.99, 4.76, 0.13, 51.38),
    Measured("Qwen3-0.6B", H100, SORTS, 1.12, 5.56, 0.13, 64.45),
    Measured("SmolLM2-135M-padded", H200, HALF, 0.36, 0.24, 0.22, 69.07, 2_414_128),
    Measured("SmolLM2-135M-padded-w4a16", H200, HALF, 0.15, 0.21, 0.22, 69.32, 2_422_864),
    Measured(
        "opt-125m", A100, PlanSettings(lora_rank=16, version=(0, 11)), None, None, None, 34.79, 1_013_184
    ),
    Measured(
        QWEN_NEXT,
        GPU_16,
        PlanSettings(max_len=512, cpu_offload_gib=90, version=(0, 11)),
        1.19,
        None,
        None,
        11.94,
        122_368,
    ),
)
# Runs of `benchmarks/gpu/vllm_truth.py` in docs/results/vllm-h200.json, with steps of 16384 tokens.
H200_RESULTS = Path(__file__).parents[1] / "docs" / "results" / "vllm-h200.json"
H200_RUNS = {
    "BF16 vLLM": "SmolLM2-135M-padded",
    "FP8 vLLM": "SmolLM2-135M-padded-fp8",
    "INT4 g128 vLLM": "SmolLM2-135M-padded-w4a16",
    "NVFP4 A16 vLLM": "SmolLM2-135M-padded-nvfp4",
}
H200_SETTINGS = replace(HALF, max_len=2049, max_num_seqs=16, max_num_batched_tokens=16384)
OUTCOMES = (
    Outcome("DeepSeek-R1", H100, SORTS, "out of memory while loading", "does_not_load"),
    Outcome("gpt-oss-20b", H100, SORTS, "runs", "fits"),
    Outcome(LLAMA_70B, H100, replace(SORTS, tp=2), "runs", "fits"),
    Outcome(LLAMA_70B, H100, SORTS, "no memory for the KV cache", "no_kv_memory"),
    Outcome("Llama-3.1-8B-Instruct", H100, SORTS, "runs", "fits"),
    Outcome("Qwen3-0.6B", H100, SORTS, "runs", "fits"),
    Outcome("opt-125m", A100, PlanSettings(lora_rank=16, version=(0, 11)), "runs with LoRA", "fits"),
    Outcome(
        "Mixtral-8x7B-Instruct-v0.1-FP8",
        A100,
        PlanSettings(version=(0, 11)),
        "out of memory while loading",
        "does_not_load",
    ),
    Outcome(
        "Llama-4-Scout-17B-16E-w4a16",
        A100,
        PlanSettings(max_len=16000, version=(0, 11)),
        "out of memory while loading",
        "does_not_load",
    ),
    Outcome(
        QWEN_NEXT,
        GPU_16,
        PlanSettings(max_len=512, utilization=0.85, version=(0, 11)),
        "out of memory while loading",
        "does_not_load",
    ),
    Outcome(
        QWEN_NEXT,
        GPU_16,
        PlanSettings(max_len=512, utilization=0.3, version=(0, 11)),
        "out of memory while loading",
        "does_not_load",
    ),
    Outcome(
        QWEN_NEXT,
        GPU_16,
        PlanSettings(max_len=512, cpu_offload_gib=90, version=(0, 11)),
        "loads, then cannot offload a hybrid model",
        "offload_unsupported",
    ),
    Outcome("SmolLM2-135M-padded", H200, HALF, "runs", "fits"),
)


def tensors(name: str) -> list[RawTensor]:
    """Headers of a model of tests/vllm_memory/models, one after another in one file."""
    described = json.loads((MODELS / f"{name}.json").read_text())
    ranges = {key: range(*bounds) for key, bounds in described["ranges"].items()}
    found: list[RawTensor] = []
    offset = 0
    for template, dtype, shape in described["tensors"]:
        keys = re.findall(r"{(\w+)}", template)
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        for numbers in itertools.product(*(ranges[key] for key in keys)):
            full = template.format(**dict(zip(keys, numbers, strict=True)))
            found.append(RawTensor(full, dtype, tuple(shape), Path(name), offset, size))
            offset += size
    return found


def config(name: str) -> dict[str, object]:
    """config.json of a model of tests/vllm_memory/models."""
    found: dict[str, object] = json.loads((MODELS / f"{name}.json").read_text())["config"]
    return found


def shape(name: str) -> ModelShape:
    """A model of tests/vllm_memory/models."""
    return make_shape(name, config(name), tensors(name))


def write_checkpoint(name: str, folder: Path) -> Path:
    """The same as a checkpoint directory: a real header, and a hole where the weights would be."""
    folder.mkdir(parents=True)
    stored = tensors(name)
    header = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.bytes]}
        for t in stored
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + sum(t.bytes for t in stored))
    (folder / "config.json").write_text(json.dumps(config(name)))
    return folder


def given(row: Measured, shapes: dict[str, ModelShape]) -> VllmPlan:
    """The plan with the run's own activation and non-torch memory."""
    settings = replace(row.settings, activation_gib=row.activation, non_torch_gib=row.non_torch)
    return plan(shapes[row.model], row.gpu, settings)


def h200_memory() -> dict[str, dict[str, float]]:
    """Label -> what the engine reported, GiB."""
    found: dict[str, dict[str, float]] = json.loads(H200_RESULTS.read_text())["agreement"]["vllm_memory"]
    return {label: found[label] for label in H200_RUNS}


def print_h200() -> None:
    """Predicted and measured for the runs on an H200, unrounded."""
    print()
    print("| model | weights | planned | activation | planned | non-torch | planned | KV cache | planned |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label, used in h200_memory().items():
        planned = plan(shape(H200_RUNS[label]), H200, H200_SETTINGS)
        cells = [f"{used['weights_gib']:.3f}", f"{planned.weights_gib:.3f}"]
        for key, estimate in (
            ("peak_activation_gib", planned.activation),
            ("non_torch_gib", planned.non_torch),
            ("kv_cache_gib", planned.kv_gib),
        ):
            cells += [
                f"{used[key]:.2f}",
                f"{estimate.expected:.2f} ({estimate.low:.2f} to {estimate.high:.2f})",
            ]
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables."""
    shapes = {row.model: shape(row.model) for row in (*MEASURED, *OUTCOMES)}
    print("| model | GPU | weights, measured | planned | off by | activation, measured | estimated (range) |")
    print("|---|---|---|---|---|---|---|")
    for row in MEASURED:
        planned = plan(shapes[row.model], row.gpu, row.settings)
        off = "–" if row.weights is None else f"{100 * (planned.weights_gib / row.weights - 1):+.2f} %"
        estimate = planned.activation
        print(
            f"| {_name(row.model, row.settings)} | {row.gpu.name} | {_gib(row.weights)} "
            f"| {planned.weights_gib:.3f} | {off} | {_gib(row.activation)} "
            f"| {estimate.expected:.2f} ({estimate.low:.2f} to {estimate.high:.2f}) |"
        )
    print()
    print(
        "| model | GPU | KV cache, measured | planned from the run's activation | from the estimates alone | "
        "tokens, measured | planned from the measured KV cache |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in MEASURED:
        alone = plan(shapes[row.model], row.gpu, row.settings)
        with_measured = f"{given(row, shapes).kv_gib.expected:.2f}" if row.activation else "–"
        tokens_from = alone.pool.tokens(row.kv * 2**30, alone.max_len, row.settings.version)
        print(
            f"| {_name(row.model, row.settings)} | {row.gpu.name} | {row.kv:.2f} | {with_measured} "
            f"| {alone.kv_gib.expected:.2f} | {f'{row.kv_tokens:,}' if row.kv_tokens else '–'} "
            f"| {f'{tokens_from:,}' if row.kv_tokens else '–'} |"
        )
    print()
    print("| model | GPU | what happened | planned | right |")
    print("|---|---|---|---|---|")
    for outcome in OUTCOMES:
        planned = plan(shapes[outcome.model], outcome.gpu, outcome.settings)
        right = "yes" if planned.status == outcome.status else "**no**"
        print(
            f"| {_name(outcome.model, outcome.settings)} | {outcome.gpu.name} | {outcome.happened} "
            f"| {planned.verdict} | {right} |"
        )
    print_h200()


def _name(model: str, settings: PlanSettings) -> str:
    parts = [f"TP {settings.tp}"] if settings.tp > 1 else []
    parts += [f"utilization {settings.utilization:g}"] if settings.utilization else []
    parts += [f"{settings.cpu_offload_gib:g} GiB offloaded"] if settings.cpu_offload_gib else []
    parts += [f"LoRA rank {settings.lora_rank}"] if settings.lora_rank else []
    return ", ".join([model, *parts])


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
