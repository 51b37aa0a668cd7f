"""Starting vLLM for scoring: its environment, its errors in one line, its warnings as notes."""

import logging
import os
import re
import traceback
from pathlib import Path
from typing import Any

from evalq.backends._vllm_options import Hardware
from evalq.engine.failures import classify
from evalq.errors import ModelError

_SETTINGS = {
    # In this process, so that ending it ends the engine; with several GPUs only their workers are children.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # A window may fill all positions: the one token generated after it is never fed back.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # The token is thrown away, so a sampler that compiles itself first is of no use.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_LOG_TAIL_BYTES = 200_000
_ELSEWHERE = re.compile(r"See (root cause|stack trace) (above|for root cause)|initialization failed")
_RAISED = re.compile(r"(?:^|\] |\) )((?:[\w.]+\.)?\w*(?:Error|Exception)): (\S.*)$", re.MULTILINE)
_UNSUPPORTED = re.compile(
    r"Failed to find a kernel|not supported|[Uu]nsupported|NotImplementedError|is no longer supported"
    r"|No compressed-tensors compatible scheme|Unknown quantization|capability|are not available"
    r"|only supports?|does not support|Cannot find (any of )?.*quant"
)
_ACCURACY = re.compile(
    r"accura|precision|native support|weight-only|dequanti|emulat|global scale|scaling factor|Casting torch"
    r"|downcast|lossy|garbage|incorrect",
    re.IGNORECASE,
)
_ACCURACY_INFO = re.compile(r"accuracy (drop|loss|degrad)|reduce[ds]? accuracy", re.IGNORECASE)
# What runs a format that this machine cannot, for the remedy. The first key found in the message counts.
_RUNS_ON = (
    (
        r"nvfp4|fp4",
        "4-bit floats need an NVIDIA GPU: 10.0 or newer computes in them, older ones take their weights",
    ),
    (
        r"fp8|float8|w8a8",
        "FP8 needs an NVIDIA GPU of compute capability 8.9 or newer, or 7.5 for weights alone",
    ),
    (
        r"wna16|mixed precision|marlin|\bint[48]\b",
        "another bit width or group size, or an NVIDIA GPU (7.5 or newer), may run it",
    ),
)


def set_environment(threads: int | None) -> None:
    """Environment variables that vLLM reads while it is imported; those the user has set stay."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def find_hardware() -> Hardware:
    """What vLLM's platform sees. Raises ModelError when there is no device for this build."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Hardware(True, 1, int(current_platform.get_device_total_memory()), os.uname().machine, None)
    import torch

    count = torch.accelerator.device_count() if hasattr(torch, "accelerator") else torch.cuda.device_count()
    if not count:
        raise ModelError("No CUDA GPUs are available to this build of vLLM", "no_gpu")
    capability = current_platform.get_device_capability()
    return Hardware(
        is_cpu=False,
        count=count,
        memory_bytes=int(current_platform.get_device_total_memory()),
        name=str(current_platform.get_device_name()),
        capability=None if capability is None else (capability.major, capability.minor),
    )


def start(arguments: dict[str, Any]) -> Any:
    """A vllm.LLM. Raises ModelError with vLLM's own reason; the traceback goes to standard error."""
    from vllm import LLM

    try:
        return LLM(**arguments)
    except Exception as error:  # vLLM raises whatever its parts do; all of it means that there is no engine
        traceback.print_exc()
        raise start_error(error, own_log()) from None


def start_error(error: BaseException, log: str) -> ModelError:
    """Sort what vLLM raised while starting.

    Args:
        error: the exception.
        log: what was printed, for errors that only say that the reason is further up.
    """
    words = f"{type(error).__name__}: {error}"
    if _ELSEWHERE.search(words):
        found = [match for match in _RAISED.findall(log) if not _ELSEWHERE.search(match[1])]
        if found:
            words = f"{found[-1][0]}: {found[-1][1]}"
    message = _one_line(words)
    category = classify(words, "load")
    if category in ("engine_error", "unsupported_format") and _UNSUPPORTED.search(words):
        return ModelError(message, "unsupported_format", _runs_on(words))
    return ModelError(message, category)


def _one_line(words: str) -> str:
    """Pydantic wraps a reason into a headline and a dump of the value; a list of reasons follows a colon."""
    inner = re.search(r"^\s+(?:Value|Assertion) error, (.+?)(?: \[type=.*)?$", words, re.MULTILINE)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    message = inner.group(1) if inner else lines[0]
    if message.endswith(":") and len(lines) > 1 and not inner:
        message = f"{message} {'; '.join(lines[1:])}"
    return message[:500]


def _runs_on(words: str) -> str | None:
    return next((remedy for pattern, remedy in _RUNS_ON if re.search(pattern, words, re.IGNORECASE)), None)


def own_log() -> str:
    """The end of standard error where that is a file; processes started from here write there too."""
    log = Path("/proc/self/fd/2")
    try:
        if not log.is_file():
            return ""
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


class AccuracyWarnings:
    """Collects what vLLM logs about numbers that may not be what the format would give.

    It looks at records where they are made: vLLM configures its loggers anew while an engine starts, which
    drops handlers, and says some of this at level INFO. What worker processes of several GPUs log stays in
    the worker's log.
    """

    def __init__(self, notes: list[str]) -> None:
        """Put them into `notes`, each once, until stop()."""
        self._notes = notes
        self._factory = logging.getLogRecordFactory()
        logging.setLogRecordFactory(self._record)

    def stop(self) -> None:
        """Listen no more."""
        logging.setLogRecordFactory(self._factory)

    def _record(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        if record.name.split(".")[0] == "vllm" and record.levelno >= logging.INFO:
            about = _ACCURACY if record.levelno >= logging.WARNING else _ACCURACY_INFO
            message = " ".join(record.getMessage().split())
            note = f"vLLM: {message[:400]}"
            if about.search(message) and note not in self._notes:
                self._notes.append(note)
        return record


def numerics_notes(quantization: dict[str, Any], hardware: Hardware, linear_backend: str) -> list[str]:
    """What runs with other numerics than the format's on this hardware.

    Args:
        quantization: the checkpoint's quantization_config, {} without one.
        hardware: where it runs.
        linear_backend: kernel family asked for, "auto" without.
    """
    if hardware.capability is None or linear_backend == "emulation":
        return []
    bits = _activation_bits(quantization)
    needed = {4: (10, 0), 8: (8, 9)}.get(bits or 0)
    if needed is None or hardware.capability >= needed:
        return []
    has = ".".join(map(str, hardware.capability))
    return [
        f"the format quantizes activations to {bits}-bit floats; {hardware.name} (compute capability {has}) "
        'runs its weights alone ("linear_backend": "emulation" gives the format\'s own numerics)'
    ]


def _activation_bits(quantization: dict[str, Any]) -> int | None:
    """Bits of floating-point activations that the format asks for, None where it asks for none."""
    if quantization.get("quant_method") == "modelopt" or "NVFP4" in str(quantization.get("quant_algo")):
        return 4 if "NVFP4" in str(quantization.get("quant_algo")) else 8
    if quantization.get("quant_method") == "fp8":
        return 8
    groups = (quantization.get("config_groups") or {}).values()
    asked = [group.get("input_activations") for group in groups if group.get("input_activations")]
    floats = [int(one["num_bits"]) for one in asked if one.get("type") == "float"]
    return min(floats, default=None)
