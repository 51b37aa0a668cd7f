"""What vLLM will need for a checkpoint, with the arguments that this backend gives it."""

import re

from evalq.backends import _vllm_columns
from evalq.backends._vllm_cache import OLDER, most_step_tokens, type_argument
from evalq.backends._vllm_options import Hardware, step_bytes, step_tokens_for, utilization_for
from evalq.checkpoint.shape import read_shape
from evalq.engine.backend import LoadRequest, Machine, Prediction
from evalq.vllm_memory.gpus import gpu_reported
from evalq.vllm_memory.plan import PlanSettings, plan


def predict(request: LoadRequest, machine: Machine) -> Prediction | None:
    """Plan a model for the smallest GPU of a machine; None without one. Raises SpecError."""
    version = re.match(r"(\d+)\.(\d+)", machine.versions.get("vllm", ""))
    if not machine.gpus or version is None:
        return None
    gpu = gpu_reported(*min(machine.gpus, key=lambda gpu: gpu[1]))
    options, shape = request.options, read_shape(str(request.path))
    hardware = Hardware(False, len(machine.gpus), int(gpu.total_gib * 2**30), gpu.name, None)
    usual_tokens = options.get("max_num_batched_tokens", step_tokens_for(hardware, shape.vocab))
    step_tokens = most_step_tokens(usual_tokens, request)
    beside = step_bytes(shape.vocab, step_tokens) + _vllm_columns.device_bytes(request)
    share = utilization_for(hardware.memory_bytes, beside)
    planned = plan(
        shape,
        gpu,
        PlanSettings(
            tp=options.get("tensor_parallel_size", 1),
            pp=options.get("pipeline_parallel_size", 1),
            utilization=options.get("gpu_memory_utilization", share),
            max_len=options.get("max_model_len", request.window_tokens + 1),
            kv_dtype=str(type_argument(options).get(OLDER) or options.get(OLDER, "auto")),
            lora_rank=request.adapter.rank if request.adapter else 0,
            cpu_offload_gib=options.get("cpu_offload_gb", 0.0),
            eager=options.get("enforce_eager", True),
            max_num_seqs=options.get("max_num_seqs", 2 * max(1, step_tokens // request.window_tokens)),
            max_num_batched_tokens=step_tokens,
            version=(int(version[1]), int(version[2])),
        ),
    )
    return Prediction(
        planned.verdict,
        planned.category if planned.is_certain else None,
        {
            "weights_gib": planned.weights_gib,
            "peak_activation_gib": planned.activation.expected,
            "non_torch_gib": planned.non_torch.expected,
            "cuda_graphs_gib": planned.graphs.expected,
            "kv_cache_gib": planned.kv_gib.expected,
            "kv_cache_tokens": float(planned.kv_tokens),
        },
    )
