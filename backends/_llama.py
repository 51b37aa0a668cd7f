"""llama.cpp below the gguf backend: import, log, why a step failed, opening a file, tokens.

Everything goes through the C API that llama-cpp-python exposes with ctypes; the names are those of
https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

import ctypes
import re
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evalq.checkpoint.adapter import Adapter
from evalq.errors import ModelError

_LEVEL_WARN, _LEVEL_ERROR, _LEVEL_CONT = 3, 4, 5  # enum ggml_log_level in ggml.h
_LOG_LINES_MAX = 4000  # a loader prints one line per metadata key and per tensor type
_VOCAB_TYPE_NONE = 0
_INT32_MIN = -(2**31)
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

# The first match from the top decides: causes stand above the general words that follow them.
_FAILURES: tuple[tuple[str, str], ...] = (
    (r"insufficient memory|[Cc]annot allocate memory|bad_alloc|out of memory", "oom_load"),
    (
        r"(failed|unable) to allocate|failed to reserve initial output buffer|could not reserve space",
        "oom_load",
    ),
    (r"unknown model architecture|unknown (pre-)?tokenizer|CLIP cannot be used", "unsupported_format"),
    (
        r"invalid ggml type|block size \(0\)|GGUFv1 is no longer|only supports up to version",
        "unsupported_format",
    ),
    (r"quantized V cache|cache type .* does not divide|different K .* and V|SPLIT_MODE_\w+", "bad_option"),
    (r"invalid value for main_gpu", "bad_option"),
)


class EngineLog:
    """llama.cpp's log kept in memory, so that it reaches neither stdout nor stderr.

    The log of llama.cpp is global to the process, hence so is this object: `engine()` installs it.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lines: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES_MAX)

    def add(self, level: int, text: bytes) -> None:
        """Take one event; a continuation is joined to the line before it."""
        words = text.decode("utf-8", "replace")
        if level == _LEVEL_CONT and self._lines:
            last_level, last = self._lines.pop()
            self._lines.append((last_level, last + words))
        else:
            self._lines.append((level, words))

    def clear(self) -> None:
        """Forget everything, before an operation whose messages are wanted alone."""
        self._lines.clear()

    def errors(self, most: int = 3) -> str:
        """The first error lines joined by "; ", without function names; "" when there were none.

        The cause comes first, then each caller says that it failed too.
        """
        return "; ".join(dict.fromkeys(self._of_level(_LEVEL_ERROR)[:most]))

    def warnings(self) -> list[str]:
        """Each warning once, in order."""
        return list(dict.fromkeys(self._of_level(_LEVEL_WARN)))

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Where lines of any level match, in order."""
        found = (re.search(pattern, line) for _, line in self._lines)
        return [match for match in found if match]

    def _of_level(self, wanted: int) -> list[str]:
        lines = (re.sub(r"^\w+: ", "", line.strip()) for level, line in self._lines if level == wanted)
        return [line for line in lines if line]


LOG = EngineLog()
_callbacks: list[Any] = []  # ctypes callbacks must outlive the library that calls them


def engine() -> ModuleType:
    """The llama_cpp module with its log routed into LOG. Raises ModelError("engine_missing")."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        message = f"llama-cpp-python cannot be imported: {error}"
        raise ModelError(message, "engine_missing", "pip install 'evalq[gguf]'") from error
    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(lambda level, text, _: LOG.add(level, text)))
        llama_cpp.llama_backend_init()
    # llama_cpp.Llama and others install their own; the last to ask gets the log.
    llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    module: ModuleType = llama_cpp
    return module


def failure(what: str, path: Path, otherwise: str = "model_corrupt") -> ModelError:
    """The ModelError for a step that llama.cpp refused, in the words of its log.

    Args:
        what: the step.
        path: the model file.
        otherwise: the category when the log matches none.
    """
    words = LOG.errors() or "llama.cpp gave no reason"
    message = f"{path.name}: {what}: {words}"[:600]
    if re.search(r"illegal split file idx", words):
        return ModelError(message, "model_missing", "name the first part (-00001-of-) in model_dir")
    for pattern, category in _FAILURES:
        if re.search(pattern, words):
            return ModelError(message, category)
    return ModelError(message, otherwise)


def first_part(path: Path) -> Path:
    """The GGUF file to open: `path` itself, or the only model (first part of a split) of a directory."""
    if not path.is_dir():
        return path
    names = sorted(path.glob("*.gguf"))
    parts = [(p, _SPLIT_NAME.search(p.name)) for p in names]
    firsts = [p for p, match in parts if match is None or int(match[1]) == 1]
    if len(firsts) == 1:
        return firsts[0]
    found = ", ".join(p.name for p in firsts[:8]) or "none"
    raise ModelError(
        f"{path} should hold one GGUF model, found: {found}", "model_missing", "name the file in model_dir"
    )


def tokenize(
    vocab: Any,
    text: str,
    add_special: bool = False,
    capacity: int | None = None,
    parse_special: bool = False,
) -> list[int]:
    """Ids of `text` by the model's own vocabulary.

    Args:
        vocab: llama_vocab pointer.
        text: any text; it is tokenized as a whole, because cutting it could change merges.
        add_special: put BOS and EOS around it as the vocabulary asks for.
        capacity: room for this many ids at first; None takes one per byte of text.
        parse_special: take what is written as a special token for one, as in a rendered chat.
    """
    llama_cpp = engine()
    raw = text.encode("utf-8")
    room = len(raw) + 8 if capacity is None else capacity
    for _ in range(2):
        ids = np.empty(room, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = llama_cpp.llama_tokenize(vocab, raw, len(raw), pointer, room, add_special, parse_special)
        if count >= 0:
            kept: list[int] = ids[:count].tolist()
            return kept
        if count == _INT32_MIN:
            break
        room = -count  # the number of ids it needs
    raise ModelError(
        f"llama_tokenize failed on {len(raw)} bytes of text", "engine_error", "take a shorter text"
    )


def detokenize(vocab: Any, ids: list[int]) -> str:
    """The text of ids by the model's own vocabulary, special tokens included.

    Args:
        vocab: llama_vocab pointer.
        ids: of this vocabulary.
    """
    llama_cpp = engine()
    tokens = np.asarray(ids, np.int32)
    pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    room = 16 * len(ids) + 16
    for _ in range(2):
        text = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_detokenize(vocab, pointer, len(ids), text, room, False, True)
        if count >= 0:
            return text.raw[:count].decode("utf-8", errors="replace")
        room = -count  # the number of bytes it needs
    raise ModelError(f"llama_detokenize failed on {len(ids)} tokens", "engine_error")


def pieces(vocab: Any, ids: list[int]) -> list[bytes]:
    """What each token stands for, special tokens written out."""
    llama_cpp = engine()
    found, room = [], 64
    piece = ctypes.create_string_buffer(room)
    for token in ids:
        count = llama_cpp.llama_token_to_piece(vocab, token, piece, room, 0, True)
        if count < 0:
            room = -count
            piece = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(vocab, token, piece, room, 0, True)
        found.append(piece.raw[: max(0, count)])
    return found


def has_vocabulary(vocab: Any) -> bool:
    """Whether the file holds a tokenizer at all."""
    return bool(engine().llama_vocab_type(vocab) != _VOCAB_TYPE_NONE)


def open_model(path: Path, params: Any) -> Any:
    """A llama_model pointer; with params.vocab_only without weights. Raises ModelError."""
    LOG.clear()
    model = engine().llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise failure("llama.cpp cannot load it", path)
    return model


def open_adapter(model: Any, adapter: Adapter) -> Any:
    """A llama_adapter_lora pointer, freed with the model. Raises ModelError."""
    LOG.clear()
    pointer = engine().llama_adapter_lora_init(model, str(adapter.path).encode())
    if not pointer:
        raise failure(f"llama.cpp cannot load the adapter {adapter.path.name}", adapter.path, "bad_adapter")
    return pointer


def apply_adapter(context: Any, adapter: Any, path: Path) -> None:
    """Use an adapter at full strength from now on. Raises ModelError."""
    adapters, scales = (engine().llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if engine().llama_set_adapters_lora(context, adapters, 1, scales) != 0:
        raise failure("llama.cpp cannot apply the adapter", path, "bad_adapter")
