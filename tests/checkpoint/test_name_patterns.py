"""Patterns of strangers: a limit of time, of length, of number."""

import json

import pytest
from checkpoints import compressed, llama, packed_int4, small_config, write_model

from evalq.checkpoint.name_patterns import COUNT_MAX, NamePatterns
from evalq.inspect import check

SLOW = r"^(.|[a-z_.0-9])*[A-Z]$"  # exponential in the length of a name that does not match
NAME = "model.layers.0.mlp.gate_proj"


def test_patterns_are_found_as_the_standard_library_finds_them():
    patterns = NamePatterns()
    assert patterns.found(r"mlp\.\w+_proj$", "model.layers.0.mlp.up_proj")
    assert not patterns.found(r"^mlp", "model.layers.0.mlp.up_proj")
    assert not patterns.refused


@pytest.mark.parametrize("pattern", ["(", "(" * 300, "a" * 2000, "[", "(?P<x", "*", "a{5,2}"])
def test_what_is_no_pattern_matches_nothing(pattern):
    patterns = NamePatterns()
    assert not patterns.found(pattern, "a")
    assert patterns.refused == {pattern}


def test_a_slow_pattern_is_given_up():
    patterns = NamePatterns()
    assert not patterns.found(SLOW, NAME)
    assert patterns.refused == {SLOW}
    assert patterns.found("model", "model.a")


def test_many_slow_patterns_end_the_search():
    patterns = NamePatterns()
    assert not any(patterns.found(SLOW + "$" * number, NAME) for number in range(1, 100))
    assert not patterns.found("model", "model.a")


def test_too_many_patterns():
    patterns = NamePatterns()
    assert not any(patterns.found(f"x{number}", "a") for number in range(COUNT_MAX))
    assert not patterns.found("a", "a")


@pytest.mark.timeout(60)
def test_a_checkpoint_with_slow_patterns_is_checked(tmp_path):
    settings = compressed(4, "pack-quantized") | {"ignore": [f"re:{SLOW}{'$' * n}" for n in range(1, 50)]}
    config = small_config(quantization_config=settings)
    path = write_model(tmp_path / "m", llama(config, packed_int4), config)
    shapes = llama(config, packed_int4) | llama(config)
    write_model(path, shapes, json.loads((path / "config.json").read_text()))
    assert "unquantized-not-ignored" in {finding.name for finding in check(path)}
