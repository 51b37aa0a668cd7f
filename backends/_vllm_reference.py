"""Whether a model in vLLM can be a reference: its logits are those of a plain matrix of its checkpoint.

Axes in names: d inputs of the head, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalq.backends._torch_reference import dtype_name, find_weight, makes_again
from evalq.engine.reference import ReferenceHead

# vLLM's methods of layers that multiply by the weight as it is.
_PLAIN = ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")


@dataclass(frozen=True)
class HeadProbe:
    """The way from what goes into the head to logits, as one call of the model took it.

    Args:
        processor: vLLM's LogitsProcessor.
        lm_head: the head that it was given.
        bias: of the head, or None.
        rows_1d: what went into the head.
        logits_1V: what came out of the model, float32 on the CPU.
    """

    processor: Any
    lm_head: Any
    bias: Any
    rows_1d: Any
    logits_1V: Any

    @classmethod
    def of(cls, runner: Any) -> "HeadProbe | None":
        """Ask for the logits of one row; None where they do not come from one plain LogitsProcessor.

        Every worker with a part of the head has to call this: they work out the logits together.
        """
        import torch
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model, config = runner.get_model(), runner.model_config
        processors = [module for module in model.modules() if type(module) is LogitsProcessor]
        if len(processors) != 1:
            return None
        calls: list[tuple[Any, ...]] = []
        hook = processors[0].register_forward_pre_hook(
            lambda module, args, given: calls.append((*args, *given.values())), with_kwargs=True
        )
        try:
            with torch.inference_mode():
                row_d = torch.linspace(-1, 1, config.get_hidden_size(), device=runner.device)
                logits = model.compute_logits(row_d.to(config.dtype)[None])
        except Exception:  # a model that wants more than this row: what it does to it is not known
            return None
        finally:
            hook.remove()
        if len(calls) != 1 or len(calls[0]) < 2 or logits is None:
            return None
        lm_head, rows, *more = calls[0]
        return cls(processors[0], lm_head, more[0] if more else None, rows, logits.float().cpu())

    def reference_head(self, checkpoint: Path) -> ReferenceHead | None:
        """How this model's distributions are kept; None where its head is no plain stored matrix."""
        processor, dtype = self.processor, dtype_name(self.rows_1d.dtype)
        plain = type(getattr(self.lm_head, "quant_method", None)).__name__ in _PLAIN
        if dtype is None or not plain or self.bias is not None or processor.logits_as_input:
            return None
        n_rows, weight = int(processor.org_vocab_size), self.lm_head.weight.detach()
        # With tensor parallelism this is the first of the shards.
        stored = find_weight(checkpoint, weight[:n_rows], n_rows) if weight.ndim == 2 else None
        if stored is None:
            return None
        rounded_to = getattr(processor, "head_dtype", None) or self.rows_1d.dtype
        head = ReferenceHead(
            kind="hidden",
            dtype=dtype,
            width=stored.columns,
            vocab_size=n_rows,
            weight=stored,
            rounded=rounded_to == self.rows_1d.dtype and dtype != "float32",
            multiplier=float(processor.scale),
            soft_cap=processor.soft_cap,
        )
        return head if makes_again(head, self.rows_1d, self.logits_1V) else None
