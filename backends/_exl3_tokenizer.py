"""The tokenizer of an EXL3 directory: transformers' where it is installed, else its tokenizer.json alone.

exllamav3 reads tokenizer.json with the `tokenizers` package and adds nothing to a text; the class here does
the same without importing the engine. transformers comes first because data specs tokenize with it by
default, and a model's own tokenizer is compared with the data spec's.

Source: https://huggingface.co/docs/tokenizers
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalq.backends._token_pieces import pieces_of
from evalq.engine.backend import Piece, Tokenizer
from evalq.errors import ModelError

TOKENIZER_FILE = "tokenizer.json"


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, without transformers. Truncation and padding that it may ask for are switched off."""

    def __init__(self, directory: Path) -> None:
        """Read the file. Raises ModelError tokenizer_mismatch when it is missing or broken."""
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            settings = _json_object(directory / "tokenizer_config.json")
        except Exception as error:  # tokenizers raises plain Exception for files it cannot read
            remedy = "set tokenizer_dir in the data spec to a directory with a tokenizer"
            message = f"{directory} has no usable {TOKENIZER_FILE}: {str(error).splitlines()[0]}"
            raise ModelError(message, "tokenizer_mismatch", remedy) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_id: int | None = self._special(settings.get("bos_token"))
        self.eos_id: int | None = self._special(settings.get("eos_token"))
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.adds_bos: bool = self.bos_id is not None and self.encode("a", True)[:1] == [self.bos_id]

    def _special(self, token: Any) -> int | None:
        """Id of a special token, given as text or as {"content": text}."""
        text = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return None if found is None else int(found)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; `add_special` adds what tokenizer.json's post-processor puts around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """From the vocabulary."""
        return pieces_of(self._tokenizer, ids)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises ModelError when there is none."""
    if importlib.util.find_spec("transformers") is not None:
        from evalq.backends import hf

        found: Tokenizer = hf.load_tokenizer(path, trust_remote_code)
        return found
    return JsonTokenizer(path)


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
