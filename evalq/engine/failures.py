"""Why a model could not be scored, sorted so that a person knows what to do next.

A category is a stable short name kept in records. The patterns are messages that torch, transformers, vLLM,
llama.cpp and the operating system really print; the first match from the top wins, so a root cause stands
above the generic message that wraps it.
"""

import re
import signal
from dataclasses import dataclass

from evalq.errors import ModelError


@dataclass(frozen=True)
class Category:
    """What a category means and what to do about it."""

    meaning: str
    remedy: str


CATEGORIES: dict[str, Category] = {
    "oom_load": Category(
        "out of memory while loading",
        "take a smaller format or a larger GPU, or split it over more GPUs (tensor_parallel_size)",
    ),
    "oom_forward": Category(
        "out of memory while scoring", 'lower "batch_windows" in the model\'s options, or eval_len'
    ),
    "no_kv_memory": Category(
        "no memory left for the KV cache",
        "raise gpu_memory_utilization, lower max_model_len, or use more GPUs",
    ),
    "max_len_too_large": Category(
        "the KV cache does not hold one sequence", "lower max_model_len to the length the message names"
    ),
    "gpu_busy": Category(
        "other processes hold the memory",
        "end them (nvidia-smi lists those of a GPU), or lower gpu_memory_utilization to what is free",
    ),
    "offload_unsupported": Category(
        "this model cannot be offloaded to the CPU", "remove cpu_offload_gb from the options"
    ),
    "no_gpu": Category("no GPU is visible", "use a machine with a GPU, a CPU build, or another backend"),
    "host_oom_or_killed": Category(
        "the process was killed by the system, most often for memory",
        "compare the model's size with this machine's RAM, then run again: it continues where it was",
    ),
    "crashed": Category(
        "the engine crashed", "run again (it continues where it was); if it repeats, report it to the engine"
    ),
    "timeout": Category(
        "took longer than --timeout", "run again with a larger --timeout: it continues where it was"
    ),
    "engine_missing": Category("the engine is not installed", "install it: evalq backends shows how"),
    "model_missing": Category("no model there", "check model_dir in the model spec"),
    "model_gated": Category(
        "the model's owner asks for a login", "accept its terms on huggingface.co, then: hf auth login"
    ),
    "model_corrupt": Category("a model file is damaged", "download or convert the file again"),
    "unsafe_checkpoint": Category("a pickle checkpoint can run code", "convert it to safetensors first"),
    "remote_code": Category(
        "the checkpoint wants to run its own code",
        'read that code; if you trust it set "trust_remote_code": true in the model spec',
    ),
    "tokenizer_mismatch": Category(
        "the model and the data spec do not share a tokenizer",
        "tokenizers cut the text differently, so numbers per token cannot be compared: --per-byte compares "
        "such models by bits per byte of the text",
    ),
    "window_too_long": Category(
        "a window is longer than the model's positions", "lower eval_len in the data spec"
    ),
    "unsupported_format": Category(
        "the engine or this hardware cannot run the format", "use another engine or format, or other hardware"
    ),
    "bad_adapter": Category(
        "the LoRA adapter does not go on this model or engine", "take the adapter's own base model"
    ),
    "not_measured": Category(
        "the engine does not read its quantized KV cache",
        'leave "kv_cache" out of the options, or take longer windows (eval_len), another attention kernel or '
        "another version of the engine",
    ),
    "bad_option": Category("an engine option is wrong", "correct it in the model spec's options"),
    "non_finite": Category(
        "the engine returned NaN or infinite log-probabilities",
        "the checkpoint or the kernel is broken for this model: try another dtype or engine",
    ),
    "download_failed": Category(
        "the model could not be downloaded", "check the name and the network; it resumes where it stopped"
    ),
    "engine_error": Category("the engine raised an error", "see the message; it is the engine's own"),
}

_OOM = r"torch\.(cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA (driver )?error: out of memory"
_OOM += r"|DefaultCPUAllocator|not enough memory|MemoryError|Unable to allocate|failed to allocate"
_OOM += r"|cudaMalloc failed|Cannot allocate memory"
_PATTERNS: tuple[tuple[str, str], ...] = (
    (
        r"No available memory for the cache blocks|leaving none for the KV cache"
        r"|on kv cache allocation is less than requested memory for kv",
        "no_kv_memory",
    ),
    (
        r"To serve at least one request with the models?'s max seq len"
        r"|The model's max seq len \(\d+\) is larger than",
        "max_len_too_large",
    ),
    (
        r"(Free memory on device|Available memory on node) .{1,200}? "
        r"is less than desired [CG]PU memory utilization",
        "gpu_busy",
    ),
    (r"must be divisible by tensor parallel size|is greater than the derived max_model_len", "bad_option"),
    (r"Cannot re-initialize the input batch when CPU weight offloading is enabled", "offload_unsupported"),
    (
        r"No CUDA GPUs are available|Torch not compiled with CUDA enabled|Failed to infer device type",
        "no_gpu",
    ),
    (r"Failed to load model - not enough GPU memory", "oom_load"),
    (_OOM, "oom"),
    (r"trust_remote_code=True|contains custom code", "remote_code"),
    (r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|InvalidHeader", "model_corrupt"),
    (r"GatedRepoError|401 Client Error|403 Client Error", "model_gated"),
    (
        r"No module named|ImportError|requires the .{1,200}? package|is required to|PackageNotFoundError",
        "engine_missing",
    ),
    (r"does not recognize this architecture|Unknown quantization type|not supported", "unsupported_format"),
)


_TELLS_AN_ERROR = re.compile(r"\w(Error|Exception)\b|\b[Ee]rror\b|out of memory|[Ff]ailed|terminate called")


def classify(text: str, stage: str) -> str:
    """Category of an engine's error text; `stage` is "load" or "forward"."""
    for pattern, category in _PATTERNS:
        if re.search(pattern, text):
            return f"oom_{stage}" if category == "oom" else category
    return "engine_error"


def from_exception(error: BaseException, stage: str) -> ModelError:
    """The ModelError for anything an engine raised: its own words, first line, and a category."""
    if isinstance(error, ModelError):
        return error
    words = str(error).strip()
    first = next((line.strip() for line in words.splitlines() if line.strip()), "")
    message = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return ModelError(message[:500], classify(f"{type(error).__name__}: {words}", stage))


def from_exit(returncode: int, stage: str, log_tail: str) -> ModelError:
    """The ModelError for a worker that ended without a Python error: a signal, or an exit of native code."""
    if returncode != -signal.SIGKILL:  # of a kill the log knows nothing
        # Engines also log harmless lines that a pattern matches: "multicast is not supported".
        for line in filter(_TELLS_AN_ERROR.search, reversed(log_tail.splitlines())):
            found = classify(line, stage)
            if found != "engine_error":
                return ModelError(line.strip()[:500], found)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        category = "host_oom_or_killed" if -returncode == signal.SIGKILL else "crashed"
        return ModelError(f"the worker was ended by {name} while in {stage}", category)
    return ModelError(
        f"the worker exited with code {returncode} while in {stage}: {_last_line(log_tail)}", "crashed"
    )


def remedy_of(error: ModelError) -> str:
    """The error's own remedy, else its category's."""
    return error.remedy or CATEGORIES[error.category].remedy


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"
