"""NVFP4 layers that engines fuse must share one global scale.

vLLM and others load q/k/v, and gate/up, as one matrix with one global scale. Where the files hold different
ones the engine keeps one of them and only warns; the other parts come out wrong by the ratio, and perplexity
is in the thousands. The scales are single float32 numbers, the only weight data that is read here.
"""

from collections import defaultdict
from collections.abc import Mapping

from evalq.checkpoint.findings import Finding
from evalq.checkpoint.shards import RawTensor, read_scalars

FINDING = "nvfp4-global-scale-mismatch"

_SCALE_ENDINGS = (".weight_global_scale", ".weight_scale_2")
_FUSED_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
_GROUP_OF = {module: group for group in _FUSED_GROUPS for module in group}


def global_scale_findings(tensors: Mapping[str, RawTensor]) -> list[Finding]:
    """At most one finding: the first fused group whose parts have different scales, and how many more do."""
    groups: dict[tuple[str, tuple[str, ...], str], dict[str, RawTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        ending = next((e for e in _SCALE_ENDINGS if name.endswith(e)), None)
        if ending is None:
            continue
        parent, _, module = name.removesuffix(ending).rpartition(".")
        if module in _GROUP_OF and tensor.dtype == "F32" and tensor.numel == 1:
            groups[parent, _GROUP_OF[module], ending][module] = tensor
    values = read_scalars(tensor for parts in groups.values() for tensor in parts.values())
    different = [
        (key, {module: values[tensor.name][0] for module, tensor in parts.items()})
        for key, parts in groups.items()
        if len({values[tensor.name] for tensor in parts.values()}) > 1
    ]
    if not different:
        return []
    (parent, order, ending), scales = different[0]
    shown = ", ".join(f"{module} {scales[module]:.6g}" for module in order if module in scales)
    more = f"; {len(different) - 1} more modules have the same fault" if len(different) > 1 else ""
    message = (
        f"{parent} has different {ending.lstrip('.')} in parts that engines fuse: {shown}{more}. "
        "vLLM takes one for all of them and its scores are meaningless: "
        "quantize again with one scale per fused group"
    )
    return [Finding(FINDING, parent, message, "warning")]
