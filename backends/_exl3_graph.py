"""A whole forward of ExLlamaV3 as one CUDA graph, replayed for every batch of one shape.

A window is thousands of kernel launches, and for small models the CPU needs longer to make them than the GPU
to run them. A graph repeats the very same kernels without the launches, in memory of its own that is as
large as one forward's. Only what cannot depend on the batch is recorded: dense Transformer blocks on one GPU,
without anything that the model derives from the token ids beside their embedding, which is looked up outside.

The first replay is compared with the scores of the same batch by single launches.

Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs, `torch.cuda.graph`
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Scores of equal kernels are equal; another kernel's float16 rounding stays far below this.
DIFFERENCE_MAX_NATS = 0.05
_RECORDABLE = {"TransformerBlock", "Attention", "GatedMLP", "MLP", "Linear", "RMSNorm", "LayerNorm"}

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """A recorded forward.

    Args:
        graph: what is replayed.
        hidden_BTH: its input, the embedded tokens.
        others: its other inputs, [R, ...]: the ids to score, rows of the reference.
        scores: its outputs by column, overwritten by every replay.
    """

    graph: Any
    hidden_BTH: Any
    others: tuple[Any, ...]
    scores: Tensors

    def run(self, embedded_BTH: Any, *others: Any) -> Tensors:
        """Scores of another batch of the same shape."""
        self.hidden_BTH.copy_(embedded_BTH)
        for held, other in zip(self.others, others, strict=True):
            held.copy_(other)
        self.graph.replay()
        return {name: column.clone() for name, column in self.scores.items()}


def dense(modules: list[Any]) -> bool:
    """Whether all modules after the embedding are of kinds that compute the same way for every token."""
    return {type(part).__name__ for module in modules[1:] for part in module} <= _RECORDABLE


def recordable(model: Any, modules: list[Any], params: dict[str, Any]) -> bool:
    """Whether nothing after the embedding depends on more than embedded tokens.

    Args:
        model: exllamav3's.
        modules: all of its modules; the first is the embedding.
        params: what the model has put beside "attn_mode" and "input_ids" for one batch.
    """
    return (
        dense(modules)
        and len({str(module.device) for module in modules[1:]}) == 1
        and set(params) <= {"attn_mode", "input_ids"}
        and not model.loaded_tp
    )


def record(step: Callable[..., Tensors], embedded_BTH: Any, others: tuple[Any, ...], device: Any) -> Replay:
    """Record one forward.

    Args:
        step: embedded tokens, other inputs -> scores; may overwrite its first argument.
        embedded_BTH: of a first batch, on any device.
        others: its other inputs, on `device`.
        device: of the body.

    Raises:
        RuntimeError: something in the forward cannot be recorded.
    """
    hidden = embedded_BTH.to(device, copy=True)
    held = tuple(other.clone() for other in others)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step(hidden, *held)  # whatever is set up at a stream's first use cannot be recorded
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # the graph's own memory takes the place of what single launches used
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        scores = step(hidden, *held)
    return Replay(graph, hidden, held, scores)
