"""What to score on: the text, its tokens and the protocol."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from evalq.spec.base import MOST, Name, PathText, Spec, resolve_path, shown
from evalq.spec.texts import TextFields, holds_messages

# Window of the GPTQ papers, in tokens.
_PAPERS_LEN = 2048

# The protocol of conversations, as in `evalq.data.protocols`.
CHAT = "chat"


# The shipped text whose questions are asked where none are named.
QUESTIONS = "sample-chat"


class Generate(Spec):
    """The reference model answers conversations: each is cut before the assistant's first turn."""

    new_tokens: int = Field(default=256, ge=1, le=MOST, description="the most tokens of an answer")
    n: int = Field(default=16, ge=1, le=MOST, description="only the first so many conversations")


class DataSpec(TextFields):
    """The text, its tokens and the protocol: everything models under comparison share."""

    tokenize_fn: Name = Field(default="auto", description='"auto", "transformers" or "gguf"')
    tokenizer_dir: PathText | None = Field(default=None, description="default: the first model's")
    protocol: Name = Field(default="exllamav3", description="how windows are cut and which tokens count")
    eval_len: int | None = Field(
        default=None, ge=2, le=MOST, description="tokens per window; default: the protocol's"
    )
    eval_stride: int | None = Field(default=None, ge=1, le=MOST, description="tokens between window starts")
    max_rows: int | None = Field(
        default=None, ge=-1, le=MOST, description="at most so many windows; null, 0 or -1: all"
    )
    max_tokens: int | None = Field(
        default=None, ge=2, le=MOST, description="only the first tokens of the stream"
    )
    bos: Literal["default", "never", "every_window"] = Field(
        default="default", description="where the token for the beginning of a text stands"
    )
    warmup_tokens: int = Field(
        default=0, ge=0, le=MOST, description="first tokens of each window that are not scored"
    )
    chat_template: bool = Field(default=False, description="put an empty chat in front of every window")
    generate: Generate | None = Field(
        default=None,
        description="the reference answers the conversations once, greedily, and all are scored on that",
    )
    dataset_display_name: str | None = Field(default=None, description="compare_q's, for its chart; not used")
    display_rows: int | None = Field(default=None, description="compare_q's, for its chart; not used")
    display_eval_len: int | None = Field(default=None, description="compare_q's, for its chart; not used")

    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="before")
    @classmethod
    def _protocol_of_chats(cls, raw: Any) -> Any:
        """Conversations have a protocol of their own, which need not be named."""
        if not isinstance(raw, dict):
            return raw
        if isinstance(raw.get("generate"), dict) and raw.get("dataset") is None:
            raw = raw | {"dataset": QUESTIONS}
        chats = holds_messages(raw.get("dataset")) or isinstance(raw.get("generate"), dict)
        if raw.get("format") is None and chats:
            raw = raw | {"format": "messages"}
        if raw.get("format") == "messages" and raw.get("protocol") is None:
            raw = raw | {"protocol": CHAT}
        return raw

    @model_validator(mode="after")
    def _as_chats(self) -> Self:
        if self.wrong_protocol is not None:
            raise ValueError(self.wrong_protocol)
        if self.format == "messages" and self.chat_template:
            raise ValueError('format "messages" has whole chats: remove "chat_template"')
        if self.format == "text" and self.generate is not None:
            raise ValueError('"generate" answers conversations: set "format": "messages"')
        return self

    @property
    def wrong_protocol(self) -> str | None:
        """Why its protocol does not fit what the text is; None where it does."""
        if self.format == "messages" and self.protocol != CHAT:
            return f'conversations have protocol "{CHAT}", not "{shown(self.protocol)}": remove it'
        if self.format == "text" and self.protocol == CHAT:
            return f'protocol "{CHAT}" is for conversations: set "format": "messages"'
        return None

    @field_validator("max_rows")
    @classmethod
    def _all_rows(cls, rows: int | None) -> int | None:
        return None if rows == -1 else rows

    @model_validator(mode="after")
    def _windows_of_text(self) -> Self:
        """As many tokens as the users of a named text score, unless the spec says how many."""
        named = self.named_text
        if named is not None and named.windows is not None and self.max_tokens is None:
            tokens = named.windows * (self.eval_len or _PAPERS_LEN)
            object.__setattr__(self, "max_tokens", tokens)  # a frozen spec is complete from here on
        return self

    def local(self, name: str) -> Path:
        """A path of this spec, relative to the file it was read from."""
        return resolve_path(name, self._base)
