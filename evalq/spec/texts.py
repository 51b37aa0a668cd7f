"""Which text: the fields of a data spec that name it, and the texts that have a name of their own.

A new named text is a row of `NAMED_TEXTS`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from evalq.spec.base import MOST, Name, PathText, Spec

# Files that hold a table, a text in each row; others are read as text.
TABLES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
# Between documents, where neither the data spec nor the named text says otherwise.
SEPARATOR = "\n\n"
# The column of a table, where none is named: of texts, and of conversations.
TEXT_COLUMN, MESSAGES_COLUMN = "text", "messages"


@dataclass(frozen=True)
class HubSet:
    """A column of a data set's split.

    Args:
        name: owner/name, or a folder laid out like a data set.
        config: None for the only one.
        split: such as "test".
        column: that holds the text.
        data_file: the one file that is read; None for all of the split.
        revision: branch, tag or commit; None for the main branch.
        rows: only the first so many; None for all.
    """

    name: str
    config: str | None = None
    split: str = "test"
    column: str = TEXT_COLUMN
    data_file: str | None = None
    revision: str | None = None
    rows: int | None = None


@dataclass(frozen=True)
class NamedText:
    """A text that a data spec calls by its name alone.

    Args:
        help: one line: what it is, and who uses it so.
        source: its file or folder in evalq's own data, or the data set on the hub.
        column: of a table that ships with evalq.
        separator: stands between documents.
        lines: rows are the lines of one file, as WikiText's are, and no documents.
        windows: only so many windows of `eval_len` tokens, as many as its users score; None for all.
    """

    help: str
    source: str | HubSet
    column: str = TEXT_COLUMN
    separator: str = SEPARATOR
    lines: bool = False
    windows: int | None = None


NAMED_TEXTS: dict[str, NamedText] = {
    "wiki2": NamedText("WikiText-2 raw test", HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"), lines=True),
    "wikitext-103": NamedText(
        "WikiText-103 raw test", HubSet("Salesforce/wikitext", "wikitext-103-raw-v1"), lines=True
    ),
    # get_ptb_new() of https://github.com/IST-DASLab/gptq/blob/main/datautils.py. The data set itself is a
    # script, which `datasets` no longer runs; this file is the hub's own conversion of it.
    "ptb": NamedText(
        "Penn Treebank test, its sentences joined by a space, as in the GPTQ papers",
        HubSet(
            "ptb-text-only/ptb_text_only",
            column="sentence",
            data_file="penn_treebank/test/0000.parquet",
            revision="refs/convert/parquet",
        ),
        separator=" ",
    ),
    # get_c4_new() there: the first 1,100 documents, and of their tokens the first 256 windows.
    "c4": NamedText(
        "C4 (en) validation, the first 256 windows of its first 1,100 documents, as in the GPTQ papers",
        HubSet(
            "allenai/c4", split="validation", data_file="en/c4-validation.00000-of-00008.json.gz", rows=1100
        ),
        separator=" ",
        windows=256,
    ),
    "sample": NamedText("English articles, ships with evalq", "sample.txt", lines=True),
    "sample-multilingual": NamedText(
        "prose in ten languages, ships with evalq", "samples/multilingual.txt", lines=True
    ),
    "sample-code": NamedText("programs in seven languages, ships with evalq", "samples/code"),
    "sample-chat": NamedText("conversations, ships with evalq", "samples/chat.jsonl", column=MESSAGES_COLUMN),
}
ALIASES = {"wikitext2": "wiki2"}
# Any file or folder, and any data set of the hub.
TEXT, HUB = "text", "hub"
DATASETS = (*NAMED_TEXTS, *ALIASES, TEXT, HUB)


def holds_messages(dataset: object) -> bool:
    """Whether that is the name of a text of conversations."""
    named = NAMED_TEXTS.get(dataset) if isinstance(dataset, str) else None
    return named is not None and named.column == MESSAGES_COLUMN


def is_table(name: str) -> bool:
    """Whether a file of this name holds rows."""
    return name.lower().endswith(TABLES)


class TextFields(Spec):
    """What a data spec says about its text."""

    format: Literal["text", "messages"] = Field(
        default="text",
        description="\"messages\": conversations by the model's own chat template, scored on the assistant's",
    )

    dataset: Name = Field(
        description='"text": files or a folder; "hub": a data set of the hub; or by name: '
        + "; ".join(f'"{name}": {named.help}' for name, named in NAMED_TEXTS.items()),
        json_schema_extra={"enum": list(DATASETS)},
    )
    path: PathText | None = Field(
        default=None,
        description='a file (text, .jsonl, .parquet), or with "glob" a folder; for a named text a local copy',
    )
    paths: list[PathText] | None = Field(
        default=None, min_length=1, description="several files, each a document or a table of them"
    )
    glob: str | None = Field(
        default=None, min_length=1, description='which files of the folder at path, such as "**/*.py"'
    )
    column: Name | None = Field(
        default=None,
        description='that holds the text, "text" by default; "a.b" for field b within column a',
    )
    rows: int | None = Field(default=None, ge=1, le=MOST, description="only the first rows of a table")
    separator: str | None = Field(
        default=None, max_length=1000, description='between documents; default: "\\n\\n"'
    )
    encoding: Name = Field(
        default="utf-8", description='of text files, such as "latin-1"; any that Python knows'
    )
    name: PathText | None = Field(
        default=None, description="owner/name on the hub, or the folder of such a data set"
    )
    config: Name | None = Field(default=None, description="of the data set on the hub")
    split: Name | None = Field(default=None, description='of the data set on the hub; default: "test"')
    revision: Name | None = Field(default=None, description="branch, tag or commit of the data set")

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.6)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            raise ValueError(f"no such text; {hint}known: {', '.join(DATASETS)}")
        return name

    @field_validator("encoding")
    @classmethod
    def _text_encoding(cls, name: str) -> str:
        try:
            " ".encode(name)  # decoding one byte would refuse UTF-16
        except (LookupError, ValueError):
            raise ValueError(
                'is no encoding of text that Python knows; try "utf-8", "utf-16" or "latin-1"'
            ) from None
        return name

    @field_validator("glob")
    @classmethod
    def _within_the_folder(cls, pattern: str) -> str:
        if pattern.startswith(("/", "~")) or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ValueError('stays within the folder at "path": neither ".." nor an absolute path')
        if "\0" in pattern:
            raise ValueError("holds a NUL character")
        return pattern

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.dataset == TEXT:
            self._check_files()
        elif self.dataset == HUB:
            self._refuse("path", "paths", "glob", "encoding")
            if self.name is None:
                raise ValueError('dataset "hub" needs "name", such as "owner/name"')
        else:
            self._check_named()
        return self

    @property
    def text_column(self) -> str:
        """The column of a table that is read."""
        return self.column or (MESSAGES_COLUMN if self.format == "messages" else TEXT_COLUMN)

    @property
    def dataset_name(self) -> str:
        """The canonical name: "wikitext2" is an alias."""
        return ALIASES.get(self.dataset, self.dataset)

    @property
    def named_text(self) -> NamedText | None:
        """What stands behind the name; None for files and for data sets of the hub."""
        return NAMED_TEXTS.get(self.dataset_name)

    def _check_files(self) -> None:
        self._refuse("name", "config", "split", "revision")
        if self.path is None and self.paths is None:
            needed = 'the folder for "glob"' if self.glob else 'the text file, or "paths", several'
            raise ValueError(f'dataset "text" needs "path", {needed}')
        if self.paths is not None and (self.path is not None or self.glob is not None):
            other = "path" if self.path is not None else "glob"
            raise ValueError(f'"{other}" and "paths" exclude each other: remove one')
        names = [self.path or ""] if self.paths is None else self.paths
        tables = [is_table(name) for name in names] if self.glob is None else [False]
        if any(tables) and not all(tables):
            raise ValueError(
                f'"paths" mixes tables ({", ".join(TABLES)}) with text files: score them as two texts'
            )
        for field in () if tables[0] else ("column", "rows"):
            if getattr(self, field) is not None:
                raise ValueError(f'"{field}" is for tables ({", ".join(TABLES)}) and data sets of the hub')
        if any(tables) and self.encoding != "utf-8":
            raise ValueError('"encoding" is for text files: tables are UTF-8')
        single = self.paths is None and self.glob is None and not tables[0]
        if single and self.separator is not None:
            raise ValueError('"separator" stands between documents, and a text at "path" is one: use "paths"')

    def _check_named(self) -> None:
        self._refuse("paths", "glob", "column", "rows", "separator", "name", "config", "split", "revision")
        named = NAMED_TEXTS[self.dataset_name]
        if isinstance(named.source, str) and self.path is not None:
            raise ValueError(
                f'dataset "{self.dataset}" ships with evalq: remove "path", or use dataset "text"'
            )

    def _refuse(self, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f'dataset "{self.dataset}" has no "{field}": {_REMEDIES[field]}')


_OTHERS = 'remove it, or name the data set with dataset "hub"'
_REMEDIES = {
    "path": 'remove it, or use dataset "text"',
    "paths": 'remove it, or use dataset "text"',
    "glob": 'remove it, or use dataset "text"',
    "encoding": "remove it, data sets hold Unicode",
    **dict.fromkeys(("column", "rows", "separator", "name", "config", "split", "revision"), _OTHERS),
}
