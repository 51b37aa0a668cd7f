"""Noise in a model's layers, for a floor below which a KL divergence says nothing.

Every layer's output is multiplied by 1 + s * normal. With s = 2**-9, half a unit in the last place of
bfloat16, that is what rounding alone may do to a model, so no format can be told from another below it.

Source of the convention: qbench of https://github.com/turboderp-org/exllamav3
"""

import zlib
from typing import Any

from evalq.errors import ModelError


class LayerNoise:
    """Multiplies the output of every layer by noise, the same for the same window."""

    def __init__(self, body: Any, n_layers: int, share: float) -> None:
        """Hook it into the model.

        Args:
            body: ids [1, T] -> hidden states; it holds its layers in one list.
            n_layers: how many that is.
            share: s.

        Raises:
            ModelError: the layers cannot be told apart.
        """
        import torch

        lists = [m for m in body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
        if not lists:
            message = f"no list of {n_layers} layers found in the model, so there is nowhere to put noise"
            raise ModelError(message, "bad_option", "remove layer_noise, or --noise-floor")
        self._share = share
        self._seed = 0
        self._generators: dict[Any, Any] = {}  # one a device
        body.register_forward_pre_hook(self._start, with_kwargs=True)
        for layer in lists[0]:
            layer.register_forward_hook(self._disturb)

    def _start(self, body: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else named["input_ids"]
        self._seed = zlib.crc32(ids.cpu().numpy().tobytes())
        self._generators.clear()

    def _disturb(self, layer: Any, arguments: Any, output: Any) -> Any:
        import torch

        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.device not in self._generators:
            self._generators[hidden.device] = torch.Generator(hidden.device).manual_seed(self._seed)
        generator = self._generators[hidden.device]
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
        noisy = (hidden.float() * (1 + self._share * noise)).to(hidden.dtype)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy
