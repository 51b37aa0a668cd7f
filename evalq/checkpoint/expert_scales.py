"""Scales of experts that calibration never reached.

In a mixture of experts calibration text passes through a few experts of each layer. One that no token reached
has no range of inputs, and quantizers write what is left: NaN or infinity, zero, or the 1.0 that the scale
was made with. An engine loads all of these without a word; a token that is sent to such an expert comes out
as NaN, as zero, or cut off.

Looked at are scales of one number per expert, such as `experts.5.up_proj.input_scale` of ModelOpt or
`experts.5.up_proj.input_global_scale` of compressed-tensors, and vectors of one number for each expert.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from evalq.checkpoint.findings import Finding
from evalq.checkpoint.shards import RawTensor, read_scalars

_SCALE = r"(?P<scale>\w*scale(_2|_inv)?)"
# A tensor of one expert.
EXPERT = re.compile(r"(?P<layer>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)")
_ONE = re.compile(rf"(?P<layer>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)\.{_SCALE}")
_STACKED = re.compile(
    r"(?P<layer>.*\bexperts)\.(?P<part>\w+?)[._](?P<scale>(input|weight|global)\w*scale(_2)?)"
)
_EXPERTS_MAX = 4096
_LAYERS_SHOWN, _EXPERTS_SHOWN = 4, 8
_DEFAULT = 1.0


@dataclass(frozen=True)
class _Fault:
    """A kind of value that no calibration gives.

    Args:
        finding: its name.
        what: of the scale, in words.
        effect: on a token that is sent there.
    """

    finding: str
    what: str
    effect: str


_NOT_FINITE = _Fault("expert-scale-not-finite", "NaN or infinite", "tokens sent there come out as NaN")
_ZERO = _Fault("expert-scale-zero", "zero", "tokens sent there come out as zero or NaN")
_UNSET = _Fault("expert-scale-default", "1 exactly", "the range of their inputs was never measured")


def expert_scale_findings(tensors: Mapping[str, RawTensor]) -> list[Finding]:
    """One finding for each kind of scale and fault, with the layers and experts that have it.

    Args:
        tensors: every stored tensor by name.

    Raises:
        ModelError: model_corrupt if a scale cannot be read.
    """
    faulty: dict[tuple[str, _Fault], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    n_experts: dict[str, int] = {}
    for (layer, _, scale), values in _by_layer(tensors).items():
        n_experts[layer] = max(n_experts.get(layer, 0), *(expert + 1 for expert in values))
        for fault, experts in _faults(scale, values).items():
            faulty[scale, fault][layer] |= experts
    return [_finding(scale, fault, layers, n_experts) for (scale, fault), layers in faulty.items()]


def experts_line(layers: Mapping[str, Iterable[int]], n_experts: Mapping[str, int]) -> str:
    """Layers and numbers of experts, the first few of them.

    Args:
        layers: module of the experts -> those it is about.
        n_experts: module -> how many it has.
    """
    lines = []
    for layer in sorted(layers, key=_by_number)[:_LAYERS_SHOWN]:
        experts = sorted(layers[layer])
        shown = ", ".join(map(str, experts[:_EXPERTS_SHOWN]))
        more = f" and {len(experts) - _EXPERTS_SHOWN} more" if len(experts) > _EXPERTS_SHOWN else ""
        lines.append(f"{layer} {shown}{more} of {n_experts[layer]}")
    left = len(layers) - _LAYERS_SHOWN
    return "; ".join(lines) + (f"; and in {left} more layers" if left > 0 else "")


def experts_of(names: Iterable[str]) -> dict[str, int]:
    """How many experts each module has that keeps them apart."""
    found: dict[str, int] = {}
    for match in filter(None, map(EXPERT.fullmatch, names)):
        found[match["layer"]] = max(found.get(match["layer"], 0), int(match["expert"]) + 1)
    return found


def _by_layer(tensors: Mapping[str, RawTensor]) -> dict[tuple[str, str, str], dict[int, float]]:
    """(module of the experts, projection, scale) -> expert -> value."""
    single: dict[str, re.Match[str]] = {}
    stacked: dict[str, re.Match[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in ("F32", "F16", "BF16") or ".experts." not in f".{name}":
            continue
        if tensor.numel == 1 and (one := _ONE.fullmatch(name)):
            single[name] = one
        elif (
            len(tensor.shape) == 1 and 1 < tensor.numel <= _EXPERTS_MAX and (many := _STACKED.fullmatch(name))
        ):
            stacked[name] = many
    values = read_scalars([tensors[name] for name in (*single, *stacked)], _EXPERTS_MAX)
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for name, match in single.items():
        found[match["layer"], match["part"], match["scale"]][int(match["expert"])] = values[name][0]
    for name, match in stacked.items():
        found[match["layer"], match["part"], match["scale"]] = dict(enumerate(values[name]))
    return found


def _faults(scale: str, values: Mapping[int, float]) -> dict[_Fault, set[int]]:
    """Which experts have which fault; a scale of weights that is 1 everywhere is a format without one."""
    found: dict[_Fault, set[int]] = defaultdict(set)
    for expert, value in values.items():
        if not math.isfinite(value):
            found[_NOT_FINITE].add(expert)
        elif value == 0:
            found[_ZERO].add(expert)
        elif value == _DEFAULT:
            found[_UNSET].add(expert)
    if len(found.get(_UNSET, ())) == len(values) and not scale.startswith("input"):
        del found[_UNSET]
    return found


def _by_number(layer: str) -> list[int]:
    """Where a layer stands among others: 2 before 10."""
    return [int(number) for number in re.findall(r"\d+", layer)]


def _finding(
    scale: str, fault: _Fault, layers: Mapping[str, Collection[int]], n_experts: Mapping[str, int]
) -> Finding:
    count = sum(map(len, layers.values()))
    where = f"{count} expert{_s(count)} of {len(layers)} layer{_s(len(layers))}"
    unreached = ", which calibration seems not to have reached" if scale.startswith("input") else ""
    message = (
        f"{scale} is {fault.what} for {where} ({experts_line(layers, n_experts)}){unreached}: "
        f"{fault.effect}; quantize again with more text for calibration"
    )
    return Finding(fault.finding, min(layers, key=_by_number), message, "warning")


def _s(count: int) -> str:
    return "" if count == 1 else "s"
