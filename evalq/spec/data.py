"""What to score on: the text, its tokens and the protocol."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from evalq.spec.base import MOST, Name, PathText, Spec, resolve_path


class DataSpec(Spec):
    """The text, its tokens and the protocol: everything models under comparison share."""

    dataset: Literal["wiki2", "wikitext2", "sample", "text"] = Field(
        description='"wiki2": WikiText-2 raw test; "sample": ships with evalq; "text": any UTF-8 file at path'
    )
    path: PathText | None = Field(
        default=None, description="a local file: the text, or the original wiki.test.raw"
    )
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
    dataset_display_name: str | None = Field(default=None, description="compare_q's, for its chart; not used")
    display_rows: int | None = Field(default=None, description="compare_q's, for its chart; not used")
    display_eval_len: int | None = Field(default=None, description="compare_q's, for its chart; not used")

    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @field_validator("max_rows")
    @classmethod
    def _all_rows(cls, rows: int | None) -> int | None:
        return None if rows == -1 else rows

    @model_validator(mode="after")
    def _path_of_text(self) -> Self:
        if self.dataset == "text" and self.path is None:
            raise ValueError('dataset "text" needs "path", the text file')
        if self.dataset == "sample" and self.path is not None:
            raise ValueError('dataset "sample" ships with evalq: remove "path", or use dataset "text"')
        return self

    @property
    def dataset_name(self) -> str:
        """The canonical name: "wikitext2" is an alias."""
        return "wiki2" if self.dataset == "wikitext2" else self.dataset

    def local(self, name: str) -> Path:
        """A path of this spec, relative to the file it was read from."""
        return resolve_path(name, self._base)
