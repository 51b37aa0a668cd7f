"""A model's own tokenizer, against which the data spec's is checked."""

from collections.abc import Callable
from pathlib import Path

from evalq.engine.backend import LoadRequest, Tokenizer

HF_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def tokenize_fn(
    request: LoadRequest,
    load_tokenizer: Callable[[Path, bool], Tokenizer],
    files: tuple[str, ...] = HF_FILES,
) -> Callable[[str], list[int]] | None:
    """Text -> ids without special tokens; None for a checkpoint with none of the files."""
    if not any((request.path / name).is_file() for name in files):
        return None
    tokenizer = load_tokenizer(request.path, request.trust_remote_code)
    return lambda text: list(tokenizer.encode(text, False))
