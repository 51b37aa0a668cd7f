"""`evalq plan`: will a model fit on a GPU with vLLM."""

import argparse
from typing import TYPE_CHECKING

from evalq.cli.numbers import count, positive

if TYPE_CHECKING:
    from evalq.vllm_memory.gpus import PlannedGpu

DESCRIPTION = """\
Will a model fit on a GPU with vLLM, and how long a text will it hold?

Reads config.json and the headers of the weights, nothing more: a local directory, or owner/name on the hub
(metadata only, no weights are downloaded). Weights and KV bytes per token are exact; peak activation,
non-torch memory and CUDA graphs are estimates with a range, which --activation replaces by your measurement
(evalq memory LOG reads it from a log)."""

EXAMPLES = """\
examples:
  evalq plan meta-llama/Llama-3.1-8B-Instruct --gpu H100 --max-len 16000
  evalq plan models/my-70b-fp8 --gpu H100 --tp 2 --kv-dtype fp8
  evalq plan models/my-8b --gpu-memory 15.6 --lora-rank 16      a GPU that is not in the list

exit code: 0 it fits, 1 it does not, 2 bad usage or model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line; names are vLLM's where it has them."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or owner/name on the hub")
    parser.add_argument("--gpu", metavar="NAME", help="H100, A100-40GB, RTX 4090, ...: its memory is known")
    parser.add_argument(
        "--gpu-memory",
        type=positive,
        metavar="GIB",
        help="total memory as CUDA reports it, for a GPU without a known name",
    )
    parser.add_argument("--tp", type=count, default=1, metavar="N", help="GPUs that share each layer")
    parser.add_argument(
        "--pp", type=count, default=1, metavar="N", help="groups of layers, each with its GPUs"
    )
    parser.add_argument("--util", type=_share, metavar="U", help="gpu_memory_utilization (default: vLLM's)")
    parser.add_argument(
        "--max-len", type=count, metavar="N", help="longest sequence (default: the model's positions)"
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", "fp8", "fp8_e4m3", "fp8_e5m2"),
        help="type of the KV cache (default auto: 16 bits)",
    )
    parser.add_argument("--lora-rank", type=count, default=0, metavar="R", help="slots for LoRA adapters")
    parser.add_argument(
        "--max-loras", type=count, default=1, metavar="N", help="adapters at once (default 1)"
    )
    parser.add_argument(
        "--cpu-offload-gb", type=positive, default=0.0, metavar="GIB", help="weights per GPU kept in RAM"
    )
    parser.add_argument("--max-num-seqs", type=count, metavar="N", help="sequences at once (default: vLLM's)")
    parser.add_argument(
        "--max-num-batched-tokens", type=count, metavar="N", help="tokens per step (default: vLLM's)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--vllm",
        type=_version,
        default=(0, 26),
        metavar="VERSION",
        help="version of vLLM to plan for (default 0.26)",
    )
    parser.add_argument(
        "--activation",
        type=positive,
        metavar="GIB",
        help="measured peak activation, instead of the estimate",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Exit code 0 when it fits, else 1."""
    import sys

    from rich.console import Console

    from evalq.checkpoint.shape import read_shape
    from evalq.show.plain import json_text
    from evalq.vllm_memory.plan import PlanSettings, plan
    from evalq.vllm_memory.plan_advice import advise
    from evalq.vllm_memory.plan_output import print_plan

    gpu = _gpu(arguments.gpu, arguments.gpu_memory)
    shape = read_shape(arguments.model)
    settings = PlanSettings(
        tp=arguments.tp,
        pp=arguments.pp,
        utilization=arguments.util,
        max_len=arguments.max_len,
        kv_dtype=arguments.kv_dtype,
        lora_rank=arguments.lora_rank,
        max_loras=arguments.max_loras,
        cpu_offload_gib=arguments.cpu_offload_gb,
        eager=arguments.enforce_eager,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        version=arguments.vllm,
        activation_gib=arguments.activation,
    )
    planned = plan(shape, gpu, settings)
    advice = advise(shape, gpu, settings, planned)
    if arguments.json:
        sys.stdout.write(json_text(planned.as_dict() | {"advice": advice.as_dict()}))
    else:
        print_plan(planned, advice, Console())
    return 0 if planned.fits else 1


def _gpu(name: str | None, memory_gib: float | None) -> "PlannedGpu":
    """The GPU named, with the memory given."""
    from dataclasses import replace

    from evalq.errors import SpecError
    from evalq.vllm_memory.gpus import GPUS, PlannedGpu, gpu_named

    if name is None:
        if memory_gib is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise SpecError("name the GPU with --gpu or its memory with --gpu-memory GIB", f"GPUs: {known}")
        return PlannedGpu(f"GPU of {memory_gib:g} GiB", memory_gib, "given")
    gpu = gpu_named(name)
    return gpu if memory_gib is None else replace(gpu, total_gib=memory_gib, source="given")


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError("should be between 0 and 1")
    return value


def _version(text: str) -> tuple[int, int]:
    parts = text.removeprefix("v").split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise argparse.ArgumentTypeError("should be like 0.26")
    return int(parts[0]), int(parts[1])
