"""Counting what the routers of a mixture of experts choose, while a model scores.

Blocks of transformers hand the chosen experts to `experts(hidden_states, indices, weights)`, whatever the
router is (top k of softmax or sigmoid, groups, sparsemixer), so the indices are counted where they arrive:
one scatter per layer and pass on the device, nothing is copied from it until the end. Llama 4 multiplies all
tokens by all experts, and its router's scores are zero for those not chosen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evalq.engine.experts import ExpertTokens

_EXPERTS = "experts"


class ExpertCounter:
    """Hooks on every block of experts of a model.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        """Hook them; `layers` stays 0 for a model without any."""
        self._counts: dict[str, Any] = {}
        self._tokens: dict[str, int] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] != _EXPERTS or not isinstance(
                getattr(module, "num_experts", None), int
            ):
                continue
            router: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "router", None)
            if type(router).__name__ == "Llama4Router":
                router.register_forward_hook(self._of_scores(name))
            else:
                module.register_forward_pre_hook(self._of_indices(name), with_kwargs=True)

    def take(self) -> Mapping[str, ExpertTokens]:
        """What was counted since the last call."""
        found = {
            name: ExpertTokens(self._tokens[name], counts[:-1].cpu().numpy().astype(np.int64))
            for name, counts in self._counts.items()
            if self._tokens[name]
        }
        self._counts.clear()
        self._tokens.clear()
        return found

    def _of_indices(self, name: str) -> Any:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            import torch

            given = (*args[1:], *kwargs.values())
            chosen = (a for a in given if torch.is_tensor(a) and a.ndim == 2 and not a.is_floating_point())
            indices = next(chosen, None)
            if indices is None:
                return
            # An index that is no expert's means that the token was dropped.
            n = module.num_experts
            flat = torch.where((indices < 0) | (indices >= n), n, indices).flatten().long()
            self._add(name, indices.shape[0], flat, n)

        return count

    def _of_scores(self, name: str) -> Any:
        def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
            scores = output[0]
            self._add(name, scores.shape[0], scores.gt(0).nonzero()[:, 1], scores.shape[1])

        return count

    def _add(self, name: str, tokens: int, indices: Any, n_experts: int) -> None:
        import torch

        if name not in self._counts:
            self._counts[name] = torch.zeros(n_experts + 1, dtype=torch.long, device=indices.device)
            self._tokens[name] = 0
        self._counts[name].scatter_add_(0, indices, torch.ones_like(indices))
        self._tokens[name] += tokens
