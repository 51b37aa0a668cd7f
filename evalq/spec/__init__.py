"""What is asked: data specs, model specs, and where each engine's environment is (`evalq.toml`).

The keys of the specs are those of exllamav3's compare_q, whose files load unchanged, plus evalq's own.
"""

from evalq.spec.base import resolve_path
from evalq.spec.data import DataSpec
from evalq.spec.files import (
    expand_wildcards,
    find_spec,
    find_specs,
    load_data_spec,
    load_model_specs,
    nearest,
    shipped_specs,
)
from evalq.spec.labels import require_unique_labels, tell_apart
from evalq.spec.model import LoraSpec, ModelSpec
from evalq.spec.strict_json import read_json

__all__ = [
    "DataSpec",
    "LoraSpec",
    "ModelSpec",
    "expand_wildcards",
    "find_spec",
    "find_specs",
    "load_data_spec",
    "load_model_specs",
    "nearest",
    "read_json",
    "require_unique_labels",
    "resolve_path",
    "shipped_specs",
    "tell_apart",
]
