"""What a command line names where it could name a spec: a text, a model's folder, a GGUF file, a hub name.

Each is taken as what it is. A text is scored with the settings of the shipped wiki2.json; a model gets its
label from its name and its engine from its files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evalq.errors import SpecError
from evalq.spec import (
    DataSpec,
    ModelSpec,
    expand_wildcards,
    find_spec,
    load_data_spec,
    load_model_specs,
    shipped_specs,
    tell_apart,
)
from evalq.spec.base import shown
from evalq.spec.files import is_file, validated
from evalq.spec.texts import is_table

_TEXTS = ("*.raw", "*.txt")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# GGUF files that are no language models: vision encoders, and statistics for making quantized ones.
_NO_MODEL = ("mmproj", "imatrix")
_PEEKED_BYTES = 2**20


@dataclass(frozen=True)
class NamedModel:
    """A model that the command line names without a spec.

    Args:
        name: an existing path, or a name on the hub.
        revision: on the hub, None for the main branch.
        label: what it is called in tables and charts.
        where: as the user wrote it.
    """

    name: str
    revision: str | None
    label: str
    where: str = field(compare=False)

    def spec(self, engine: str) -> ModelSpec:
        """Its model spec on an engine."""
        where = f"-m {shown(self.where)}"
        raw = {"load_fn": engine, "model_dir": self.name, "revision": self.revision, "label": self.label}
        spec = validated(ModelSpec, raw, where)
        spec._where = where
        return spec


def data_spec(name: str) -> DataSpec:
    """The data spec behind `-d`: a spec file, or a text file or its folder. Raises SpecError."""
    _require_text(name)
    path = Path(name)
    if _is_folder(path):
        path = _text_in(path, name)
    elif not is_file(path) or path.suffix.lower() == ".json":
        return load_data_spec(find_spec(name))
    start = _start_of(path)
    if start.startswith(b"GGUF") or path.suffix.lower() == ".safetensors":
        raise SpecError(f"-d {shown(name)}: a model, not a text", "name models with -m")
    # The first line of a .jsonl file is a JSON object too.
    is_spec = not is_table(path.name) and _is_json_object(start)
    return load_data_spec(path) if is_spec else _spec_of_text(path)


def model_specs(names: Sequence[str], engine: str | None, offline: bool) -> list[ModelSpec]:
    """The models behind `-m`: spec files, model folders, GGUF files and hub names, wildcards too.

    Args:
        names: as given; one that stands there twice counts once.
        engine: backend of those that are named without a spec; None chooses by their files.
        offline: never use the network to choose.

    Raises:
        SpecError: a name is none of these.
    """
    from evalq.inspect.choice import choose_engine

    specs: list[ModelSpec] = []
    files: set[Path] = set()
    for found in dict.fromkeys(one for name in expand_wildcards(names) for one in _models_of(name)):
        if isinstance(found, Path):
            specs += load_model_specs(found) if found.resolve() not in files else []
            files.add(found.resolve())
        else:
            specs.append(found.spec(engine or choose_engine(found.name, found.revision, offline)))
    return tell_apart(specs)


def _models_of(name: str) -> Iterator[Path | NamedModel]:
    """The spec file, or the models, that one name stands for."""
    _require_text(name)
    path = Path(name)
    if _is_folder(path):
        yield from _in_folder(path, name)
    elif is_file(path):
        yield _of_file(path, name)
    else:
        on_hub = _of_hub(name)
        yield find_spec(name) if on_hub is None else on_hub


def _of_file(path: Path, name: str) -> Path | NamedModel:
    start = _start_of(path)
    if start.startswith(b"GGUF") or path.suffix.lower() == ".gguf":
        return _gguf(path, name)
    if path.suffix.lower() == ".safetensors":
        return _folder(path.parent, name)
    if path.suffix.lower() == ".json" or start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return path
    raise SpecError(
        f"-m {shown(name)}: no model spec (JSON), no GGUF file and no model's folder",
        "name the text to score on with -d",
    )


def _in_folder(folder: Path, name: str) -> Iterator[NamedModel]:
    """A checkpoint; else the GGUF files in the folder; else the checkpoints in its folders."""
    if is_file(folder / "config.json"):
        yield _folder(folder, name)
        return
    ggufs = [path for path in _sorted(folder, "*.gguf") if not any(no in path.name for no in _NO_MODEL)]
    inner = [path.parent for path in _sorted(folder, "*/config.json")]
    yield from dict.fromkeys(_gguf(path, name) for path in ggufs)
    if not ggufs:
        for below in inner:
            yield NamedModel(str(below.resolve()), None, f"{folder.resolve().name} {below.name}", name)
    if ggufs or inner:
        return
    what, remedy = "holds no config.json and no GGUF file", "name a model's folder, file or hub name"
    if is_file(folder / "adapter_config.json"):
        what, remedy = "is a LoRA adapter", 'name it in a model spec: "lora": {"path": ...} beside its model'
    elif any(is_file(folder / tokenizer) for tokenizer in _TOKENIZERS):
        what, remedy = "holds a tokenizer and no model", "name it as tokenizer_dir in a data spec"
    elif any(_sorted(folder, pattern) for pattern in _TEXTS):
        what, remedy = "holds a text and no model", "name the text to score on with -d"
    raise SpecError(f"-m {shown(name)}: {what}", remedy)


def _folder(folder: Path, name: str) -> NamedModel:
    whole = folder.resolve()
    return NamedModel(str(whole), None, whole.name or str(whole), name)


def _gguf(path: Path, name: str) -> NamedModel:
    """A GGUF file; of one in several parts the first, whichever is named."""
    first = path.with_name(_PART.sub(r"-00001-of-\2.gguf", path.name))
    whole = (first if is_file(first) else path).absolute()
    return NamedModel(str(whole), None, _PART.sub("", whole.name).removesuffix(".gguf"), name)


def _of_hub(name: str) -> NamedModel | None:
    """owner/name, owner/name@revision or owner/name/file.gguf; None for what is no such name."""
    from evalq.checkpoint.hub_access import hub_name

    repository, _, revision = name.partition("@")
    if name.endswith(".json") or hub_name(repository) is None:
        return None
    last = _PART.sub("", repository.rpartition("/")[2]).removesuffix(".gguf")
    return NamedModel(repository, revision or None, f"{last} {revision}".strip(), name)


def _text_in(folder: Path, name: str) -> Path:
    """The text of a folder: wiki.test.raw, or the only one."""
    if is_file(folder / "wiki.test.raw"):
        return folder / "wiki.test.raw"
    texts = [path for pattern in _TEXTS for path in _sorted(folder, pattern)]
    if len(texts) == 1:
        return texts[0]
    if is_file(folder / "config.json"):
        raise SpecError(f"-d {shown(name)}: a model's folder, not a text", "name models with -m")
    what = f"holds {len(texts)} texts" if texts else "holds no text (*.txt, *.raw)"
    raise SpecError(f"-d {shown(name)}: {what}", "name one text file, or a data spec")


def _spec_of_text(path: Path) -> DataSpec:
    """The shipped wiki2.json on another text, or on WikiText-2 itself where the file is that."""
    from evalq.data.rows import WIKITEXT2_TEST

    shipped = load_data_spec(shipped_specs() / "wiki2.json")
    whole = path.absolute()
    is_wikitext2 = (
        whole.stat().st_size == WIKITEXT2_TEST.n_bytes
        and hashlib.sha256(whole.read_bytes()).hexdigest() == WIKITEXT2_TEST.sha256
    )
    return shipped.model_copy(
        update={"dataset": "wiki2" if is_wikitext2 else "text", "path": str(whole), "tokenizer_dir": None}
    )


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_PEEKED_BYTES)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None


def _is_json_object(start: bytes) -> bool:
    """Whether a text file holds a data spec, whatever it is called."""
    try:
        return isinstance(json.loads(start), dict)
    except (ValueError, RecursionError):
        return False


def _require_text(name: str) -> None:
    """Raise SpecError for a file name that cannot be kept in a record."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SpecError(f"{ascii(name)}: the name is not UTF-8", "rename the file") from None


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if is_file(path))
