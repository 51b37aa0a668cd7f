"""Which engine runs a model that the user named without one."""

from evalq.errors import EvalqError
from evalq.inspect import open_model
from evalq.inspect.engines import verdicts
from evalq.inspect.facts import facts_of
from evalq.machine import this_machine

# Where several can: on a GPU the one with kernels for packed weights, else the one that reads most formats.
_ON_GPU = ("vllm", "hf", "exl3", "gguf")
_ON_CPU = ("hf", "vllm", "gguf", "exl3")


def choose_engine(name: str, revision: str | None, offline: bool) -> str:
    """The backend for a model, by its headers, what is installed and this machine.

    Where none can run it, the first that would read its format: what keeps that one from running is what the
    user then learns. Where its headers cannot be read, its name decides.

    Args:
        name: a checkpoint directory, a GGUF file, owner/name or owner/name/file.gguf on the hub.
        revision: branch, tag or commit on the hub.
        offline: never use the network.
    """
    machine = this_machine()
    order = _ON_GPU if machine.gpus else _ON_CPU
    try:
        checkpoint = open_model(name, revision, offline)
        found = {verdict.engine: verdict for verdict in verdicts(checkpoint, facts_of(checkpoint), machine)}
    except EvalqError:
        return _by_name(name)
    known = [found[engine] for engine in order if engine in found]
    runs = [verdict.engine for verdict in known if verdict.runs]
    reads = [v.engine for v in known if not any(reason.startswith("does not read") for reason in v.reasons)]
    return next(iter([*runs, *reads]), _by_name(name))


def _by_name(name: str) -> str:
    if name.lower().endswith(".gguf"):
        return "gguf"
    return "exl3" if "exl3" in name.lower() else "hf"
