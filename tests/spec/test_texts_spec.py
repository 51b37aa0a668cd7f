"""Fields of a data spec that name its text: which go together, and what is said where they do not."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from evalq.errors import SpecError
from evalq.spec import DataSpec
from evalq.spec.files import validated
from evalq.spec.schema import schemas

TEXT = {"dataset": "text"}
HUB = {"dataset": "hub", "name": "me/notes"}


@pytest.mark.parametrize(
    "raw",
    [
        {**TEXT, "path": "a.txt", "encoding": "latin-1"},
        {**TEXT, "path": "a.txt", "encoding": "utf-16"},
        {**TEXT, "path": "a.jsonl", "column": "messages.0.content", "rows": 5, "separator": " "},
        {**TEXT, "path": "src", "glob": "**/*.py", "separator": "\n\n\n"},
        {**TEXT, "paths": ["a.txt", "b.md"], "separator": ""},
        {**TEXT, "paths": ["a.parquet", "b.jsonl"], "column": "body"},
        {**HUB, "config": "en", "split": "validation", "column": "body", "revision": "main", "rows": 9},
        {"dataset": "c4", "path": "c4.json.gz"},
        {"dataset": "wikitext2", "column": None},
    ],
)
def test_what_goes_together(raw: dict[str, Any]) -> None:
    validated(DataSpec, raw, "d.json")
    jsonschema.validate(raw, schemas()["data.schema.json"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"dataset": "wikitxt2"}, 'dataset: no such text; did you mean "wikitext2"?'),
        ({"dataset": "the pile"}, "no such text; known: wiki2, wikitext-103, ptb, c4, sample"),
        (TEXT, 'dataset "text" needs "path", the text file, or "paths", several'),
        ({**TEXT, "glob": "*.py"}, 'dataset "text" needs "path", the folder for "glob"'),
        ({**TEXT, "path": "a.txt", "paths": ["b.txt"]}, '"path" and "paths" exclude each other'),
        ({**TEXT, "glob": "*", "paths": ["b.txt"]}, '"glob" and "paths" exclude each other'),
        ({**TEXT, "paths": []}, "paths: list should have at least 1 item"),
        ({**TEXT, "paths": ["a.txt", "b.jsonl"]}, '"paths" mixes tables'),
        ({**TEXT, "path": "a.txt", "column": "body"}, '"column" is for tables (.jsonl'),
        ({**TEXT, "path": "src", "glob": "*.jsonl", "rows": 3}, '"rows" is for tables (.jsonl'),
        ({**TEXT, "path": "a.txt", "separator": " "}, '"separator" stands between documents'),
        (
            {**TEXT, "path": "a.jsonl", "encoding": "latin-1"},
            '"encoding" is for text files: tables are UTF-8',
        ),
        ({**TEXT, "path": "a.txt", "split": "test"}, 'dataset "text" has no "split": remove it'),
        ({**TEXT, "path": "src", "glob": "../*"}, 'glob: stays within the folder at "path"'),
        ({**TEXT, "path": "src", "glob": "/etc/*"}, 'glob: stays within the folder at "path"'),
        ({**TEXT, "path": "a.txt", "encoding": "rot13"}, "encoding: is no encoding of text"),
        ({**TEXT, "path": "a.txt", "encoding": "utf-99"}, "encoding: is no encoding of text"),
        ({"dataset": "hub"}, 'dataset "hub" needs "name", such as "owner/name"'),
        ({**HUB, "path": "a.txt"}, 'dataset "hub" has no "path": remove it, or use dataset "text"'),
        ({**HUB, "encoding": "latin-1"}, 'dataset "hub" has no "encoding": remove it'),
        ({**HUB, "rows": 0}, "rows: input should be greater than or equal to 1, not 0"),
        ({"dataset": "ptb", "column": "text"}, 'has no "column": remove it, or name the data set'),
        ({"dataset": "sample-code", "path": "x"}, 'dataset "sample-code" ships with evalq: remove "path"'),
        ({"dataset": "c4", "colum": "x"}, 'colum: unknown key (did you mean "column"?)'),
    ],
)
def test_what_does_not_go_together(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        validated(DataSpec, raw, "d.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_c4_is_as_long_as_the_papers_have_it() -> None:
    assert DataSpec(dataset="c4").max_tokens == 256 * 2048
    assert DataSpec(dataset="c4", eval_len=512).max_tokens == 256 * 512
    assert DataSpec(dataset="c4", max_tokens=999).max_tokens == 999
    assert DataSpec(dataset="ptb").max_tokens is None


def test_paths_are_relative_to_the_spec(tmp_path: Path) -> None:
    from evalq.data.sources import load_text
    from evalq.spec import load_data_spec

    (tmp_path / "inner" / "src").mkdir(parents=True)
    (tmp_path / "inner" / "src" / "a.c").write_text("int x;\n")
    (tmp_path / "inner" / "d.json").write_text('{"dataset": "text", "path": "src", "glob": "*.c"}')
    spec = load_data_spec(tmp_path / "inner" / "d.json")
    assert load_text(spec, tmp_path / "texts", offline=True).documents == ("int x;\n",)
