"""What is asked: data specs, model specs, evalq.toml, and the names on a command line."""

import json
import tempfile
from pathlib import Path

from fuzz.harness import Target
from fuzz.mutators import mutate_bytes, mutate_json, mutate_text

from evalq.cli.given import data_spec, model_specs
from evalq.data.sources import load_text, settings_of
from evalq.engine.registry import resolve_engine
from evalq.spec import load_data_spec, load_model_specs, require_unique_labels, shipped_specs, tell_apart
from evalq.spec.config import read_config

_DATA = (
    {"dataset": "wiki2", "protocol": "exllamav3", "eval_len": 2048, "eval_stride": 512, "max_rows": 20},
    {"dataset": "text", "path": "~/a.txt", "tokenizer_dir": "$HOME/m", "bos": "never", "max_tokens": 10_000},
    {
        "tokenize_fn": "transformers", "tokenizer_dir": "/m/hf", "dataset": "wiki2", "eval_stride": 2048,
        "eval_len": 2048, "max_rows": 30, "chat_template": True, "warmup_tokens": 128,
    },
)  # fmt: skip
_MODELS = (
    {"load_fn": "transformers_auto_bf16", "fwd_fn": "transformers", "label": "HF BF16", "model_dir": "/m/hf/",
     "out_logits": "/m/ref"},
    {"load_fn": "exllamav3", "label": "EXL3 2.0 [purple]", "model_dir": ["a", "b"], "revision": "2.0bpw"},
    {"load_fn": "hf", "model_dir": "o/n", "lora": {"path": "o/l", "name": "l"}, "options": {"threads": 2},
     "python": "bin/python", "trust_remote_code": False, "override_bpw_layer": 4.5, "reference": True},
    {"load_fn": "vllm", "fwd_fn": "vllm", "label": "NVFP4",
     "model_dir": ["/m/nvfp4", {"quantization": "compressed-tensors", "tensor_parallel_size": 2,
                                "max_model_len": 2049, "disable_custom_all_reduce": True}]},
)  # fmt: skip
_TOML = b"""\
trusted = ["~/projects", "/srv/quants"]
[engines.vllm]
python = ".venv-vllm/bin/python"
[engines.exl3]
python = "$HOME/exl3/bin/python"
"""
_NAMES = (
    b"wiki2.json",
    b"sample",
    b"owner/name@4.0bpw",
    b"owner/name/file.gguf",
    b"a/*.json",
    b"~/m",
    b"./x/..",
)


def _written(data: bytes, name: str) -> Path:
    """The input as a file in a folder of its own, which the child's scratch folder holds."""
    path = Path(tempfile.mkdtemp()) / name
    path.write_bytes(data)
    return path


def _remove(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def _read_data(data: bytes) -> None:
    path = _written(data, "data.json")
    try:
        spec = load_data_spec(path)
        settings_of(spec)
        for name in filter(None, (spec.path, spec.tokenizer_dir)):
            spec.local(name).exists()
    finally:
        _remove(path)


def _read_models(data: bytes) -> None:
    path = _written(data, "models.json")
    try:
        specs = tell_apart(load_model_specs(path))
        require_unique_labels(specs)
        for spec in specs:
            spec.local(spec.main_dir).exists()
            f"{spec.group} {spec.color} {spec.plain_label} {spec.notes}".encode()
            resolve_engine(spec)
    finally:
        _remove(path)


def _read_toml(data: bytes) -> None:
    path = _written(data, "evalq.toml")
    try:
        read_config(path)
    finally:
        _remove(path)


def _read_text(data: bytes) -> None:
    """What -d names: a data spec or a text."""
    path = _written(data, "given")
    try:
        load_text(data_spec(str(path)), path.parent, offline=True)
    finally:
        _remove(path)


def _read_model(data: bytes) -> None:
    """What -m names: model specs or a GGUF file, to be told by the first bytes."""
    path = _written(data, "given")
    try:
        for spec in model_specs([str(path)], "fake", offline=True):
            spec.local(spec.main_dir).exists()
    finally:
        _remove(path)


def _read_name(data: bytes) -> None:
    name = data.decode(errors="surrogateescape").replace("\0", "")  # the system passes no NUL
    if name:
        data_spec(name)
        model_specs([name], "fake", offline=True)


def _as_json(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def _shipped() -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(shipped_specs().glob("*.json")))


TARGETS = (
    Target("data spec", lambda: _as_json(*_DATA), _read_data, mutate_json),
    Target("model specs", lambda: _as_json(list(_MODELS), *_MODELS), _read_models, mutate_json),
    Target("text of model specs", _shipped, _read_models, mutate_text),
    Target("evalq.toml", lambda: (_TOML,), _read_toml, mutate_text),
    Target("a file that -d names", lambda: (*_as_json(*_DATA[:1]), _TOML), _read_text, mutate_bytes),
    Target("a file that -m names", lambda: (*_as_json(*_MODELS), b"GGUF" + _TOML), _read_model, mutate_bytes),
    Target("a name on the command line", lambda: _NAMES, _read_name, mutate_bytes),
)
