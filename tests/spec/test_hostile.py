"""Spec files that nobody wrote by hand: each is refused in one line, quickly."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from evalq.cli.main import compare_main
from evalq.errors import SpecError
from evalq.spec import find_spec, find_specs, load_data_spec, load_model_specs

DATA = {"dataset": "sample"}
MODEL = {"load_fn": "fake", "model_dir": "tiny"}


def refused(path: Path, says: str, load: Any = load_model_specs) -> None:
    started = time.monotonic()
    with pytest.raises(SpecError, match=says) as caught:
        load(path)
    assert time.monotonic() - started < 5
    line = str(caught.value)
    assert line.isprintable() and len(line) < 600 + len(str(path))
    assert str(path) in line


def text_of(key: str, value: str, base: dict[str, Any] = MODEL) -> str:
    """A spec with one value written as it is."""
    others = {k: v for k, v in base.items() if k != key}
    return f'{{{json.dumps(others)[1:-1]}{", " if others else ""}"{key}": {value}}}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "nested more than 32 deep"),
        ("[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested more than 32 deep"),
        (text_of("options", '{"seed": ' + "[" * 100 + "]" * 100 + "}"), "nested more than 32 deep"),
        (text_of("options", '{"seed": ' + "9" * 5000 + "}"), "Exceeds the limit"),
        (text_of("options", '{"seed": ' + "9" * 30 + "}"), "999... does not fit in 64 bits"),
        (text_of("options", '{"seed": -9223372036854775809}'), "does not fit in 64 bits"),
        (text_of("override_bpw_layer", "NaN"), "NaN is not a JSON number"),
        (text_of("override_bpw_layer", "-Infinity"), "-Infinity is not a JSON number"),
        (text_of("override_bpw_layer", "1e999"), "a number is too large"),
        (text_of("label", '"a \\ud800 b"'), "half of a surrogate pair"),
        (text_of("\\udfff", "1"), "half of a surrogate pair"),
        (text_of("label", json.dumps("x" * 100_000)), "label: string should have at most 500 characters"),
        (text_of("load_fn", json.dumps("x" * 100_000)), "load_fn: string should have at most 100"),
        (text_of("x" * 100_000, "1"), "unknown key"),
        (text_of("lora", '{"pth": "a"}'), 'lora.pth: unknown key .did you mean "path"'),
        (text_of("a\\nb\\u001b[2J", "1"), r"a\\nb\\x1b\[2J: unknown key"),
        (text_of("options", json.dumps({"x" * 100_000: 1})), "options.x{40}...: string should have at most"),
        (json.dumps(MODEL | {f"key{i}": i for i in range(20_000)}), "unknown key"),
        (json.dumps([MODEL] * 1000 + [[]]), r"models\[1000\]: a model is a JSON object"),
        (json.dumps([MODEL] * 200_000), "larger than 4 MiB"),
        ("[]", "holds no model"),
        ("", "line 1 column 1: not valid JSON"),
        ("\ufeff{}x", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_hostile_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    refused(path, says)


PATHS = [
    ("a\0b", "holds a NUL character"),
    ("~nouser-at-all/model", "could not determine home"),
    ("x" * 256, "longer than 255 bytes"),
    ("é" * 128, "longer than 255 bytes"),
    ("a/" * 3000, "longer than 4095 bytes"),
    ("  ", "is empty"),
]


@pytest.mark.parametrize(("name", "says"), PATHS)
@pytest.mark.parametrize("key", ["model_dir", "overlay", "lora", "python"])
def test_a_path_that_no_file_can_have(tmp_path: Path, key: str, name: str, says: str) -> None:
    changes: dict[str, Any] = {key: name}
    if key == "overlay":
        changes = {"model_dir": ["tiny", name]}
    elif key == "lora":
        changes = {"lora": {"path": name}}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(MODEL | changes))
    refused(path, rf"models\[0\]\.\S*: .*{says}")


@pytest.mark.parametrize(("name", "says"), PATHS)
@pytest.mark.parametrize("key", ["path", "tokenizer_dir"])
def test_a_path_of_the_data(tmp_path: Path, key: str, name: str, says: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"dataset": "text", "path": "a.txt"} | {key: name}))
    refused(path, rf"data.json\.{key}: .*{says}", load_data_spec)


WRONG: list[Any] = [5, -1, 0.5, True, "text", [], ["a"], [1, 2], {}, {"a": {"b": [1]}}, 2**62, ""]


@pytest.mark.parametrize("key", ["load_fn", "fwd_fn", "label", "model_dir", "revision", "lora", "options",
                                 "python", "trust_remote_code", "reference", "out_logits",
                                 "override_bpw_layer"])  # fmt: skip
def test_wrong_types_in_a_model(tmp_path: Path, key: str) -> None:
    path = tmp_path / "spec.json"
    refusals = 0
    for value in WRONG:
        path.write_text(json.dumps(MODEL | {key: value}))
        try:
            load_model_specs(path)
        except SpecError as error:
            assert f"models[0].{key}" in str(error) and str(error).isprintable()
            refusals += 1
    assert refusals >= len(WRONG) - 5


@pytest.mark.parametrize("key", ["dataset", "path", "tokenize_fn", "tokenizer_dir", "protocol", "eval_len",
                                 "eval_stride", "max_rows", "max_tokens", "bos", "warmup_tokens",
                                 "chat_template"])  # fmt: skip
def test_wrong_types_in_the_data(tmp_path: Path, key: str) -> None:
    path = tmp_path / "data.json"
    refusals = 0
    for value in WRONG:
        path.write_text(json.dumps(DATA | {key: value}))
        try:
            load_data_spec(path)
        except SpecError as error:
            assert f"{path}" in str(error) and str(error).isprintable()
            refusals += 1
    assert refusals >= len(WRONG) - 4


@pytest.mark.parametrize("key", ["eval_len", "eval_stride", "max_rows", "max_tokens", "warmup_tokens"])
@pytest.mark.parametrize("value", [2**53 + 1, 2**63, 10**30])
def test_a_number_of_tokens_beyond_reason(tmp_path: Path, key: str, value: int) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(DATA | {key: value}))
    refused(path, "less than or equal to 9007199254740992|does not fit in 64 bits", load_data_spec)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(b"\x80\x81")
    refused(path, "not UTF-8 text")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(MODEL).encode())
    assert load_model_specs(path)[0].load_fn == "fake"


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "~nouser-at-all", "[" * 300])
def test_a_name_on_the_command_line(name: str) -> None:
    for find in (find_spec, lambda name: find_specs([name])):
        with pytest.raises(SpecError, match="no such file|no file matches") as caught:
            find(name)
        assert len(str(caught.value)) < 500


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "m.json").write_text("[" * 5000)
    assert compare_main(["-d", "data.json", "-m", "m.json"]) == 2
    assert capsys.readouterr().err == "evalq: m.json: nested more than 32 deep\n"
