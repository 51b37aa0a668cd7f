"""Texts and token streams: the real WikiText-2, the sample, any file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Runs

from evalq.data.sources import load_text, settings_of
from evalq.data.tokens import TokenStream, cut, read_stream, write_stream
from evalq.data.windows import StreamFacts
from evalq.errors import DataError
from evalq.results.store import Store
from evalq.spec import DataSpec


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "s")


def test_wikitext2_from_path_and_from_the_environment(
    wikitext2: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVALQ_WIKITEXT2")
    by_path = load_text(DataSpec(dataset="wiki2", path=str(wikitext2)), store.texts, offline=True)
    monkeypatch.setenv("EVALQ_WIKITEXT2", str(wikitext2))
    by_name = load_text(DataSpec(dataset="wikitext2"), store.texts, offline=True)
    assert by_path == by_name and by_path.name == "wiki2"
    assert len(by_path.documents) == 1 and by_path.documents[0].count("\n\n") >= 4357
    pages = load_text(DataSpec(dataset="wiki2", protocol="lm-eval"), store.texts, offline=True)
    assert len(pages.documents) == len(pages.bytes_per_document) == len(pages.words_per_document) == 62
    assert pages.sha256 != by_path.sha256


def test_wikitext2_offline_and_uncached_names_three_ways(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVALQ_WIKITEXT2", raising=False)
    with pytest.raises(DataError) as error:
        load_text(DataSpec(dataset="wiki2"), store.texts, offline=True)
    for way in ("$EVALQ_WIKITEXT2", "network", '"sample"'):
        assert way in str(error.value)


def test_wikitext2_without_a_network(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real `datasets` package, which has nothing cached and is told to stay offline."""
    monkeypatch.delenv("EVALQ_WIKITEXT2", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DataError, match="cannot be fetched.*EVALQ_WIKITEXT2"):
        load_text(DataSpec(dataset="wiki2"), store.texts, offline=False)


def test_sample_is_long_enough_and_ships(store: Store) -> None:
    text = load_text(DataSpec(dataset="sample"), store.texts, offline=True)
    assert text.name == "sample" and sum(text.words_per_document) > 10_000
    pages = load_text(DataSpec(dataset="sample", protocol="lm-eval"), store.texts, offline=True)
    assert len(pages.documents) == 12


def test_sample_in_tokens(smollm2: Callable[[str], Path], runs: Runs) -> None:
    data = runs.data(tokenize_fn="gguf", tokenizer_dir=str(smollm2("SmolLM2-135M-Instruct.Q4_1.gguf")))
    _, (record,) = runs.compare(data, runs.models({}))
    assert record["comparison"]["tokens"] >= 12_000


@pytest.mark.engine
def test_both_tokenizers_of_smollm2_give_the_known_stream(
    smollm2: Callable[[str], Path], runs: Runs, wikitext2: Path
) -> None:
    """transformers' and llama.cpp's, on the whole of WikiText-2, as two protocols join it."""
    for protocol, known in (("exllamav3", 304_978), ("llama.cpp", 303_415)):
        found = []
        for tokenize_fn, name in (("transformers", "bf16"), ("llamacpp", "SmolLM2-135M-Instruct.Q4_1.gguf")):
            data = runs.data(
                dataset="wiki2",
                path=str(wikitext2),
                protocol=protocol,
                eval_len=None,
                eval_stride=None,
                max_rows=1,
                tokenize_fn=tokenize_fn,
                tokenizer_dir=str(smollm2(name)),
            )
            _, (record,) = runs.compare(data, runs.models({}))
            found.append(record["comparison"])
        assert [facts["tokens"] for facts in found] == [known, known]
        assert found[0]["tokens_sha256"] == found[1]["tokens_sha256"]


def test_any_text_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    text = load_text(DataSpec(dataset="text", path=str(tmp_path / "a.txt")), store.texts, offline=True)
    assert text.documents == ("one\n\n\n\n\ntwo\n",) and text.name == "a.txt"
    assert text.sha256 == hashlib.sha256(text.documents[0].encode() + b"\0").hexdigest()


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b" \n\n", "is empty")])
def test_bad_text_file(store: Store, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(DataSpec(dataset="text", path=str(tmp_path / "a.txt")), store.texts, offline=True)


def test_stream_survives_the_store(tmp_path: Path) -> None:
    ids = np.arange(10)
    facts = {"n_tokens": 10, "document_ends": [4, 10], "bos_id": 1, "eos_id": None, "adds_bos": True}
    described = {"facts": facts, "probe_text": "p", "probe_ids": [1, 2], "prefix_ids": [7]}
    write_stream(tmp_path / "t.safetensors", ids, described)
    stream = read_stream(tmp_path / "t.safetensors")
    assert stream is not None and np.array_equal(stream.ids_N, ids)
    assert stream.sha256 == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert stream.facts == StreamFacts(10, (4, 10), 1, None, True) and stream.prefix_ids == (7,)
    (tmp_path / "t.safetensors").write_bytes(b"broken")
    assert read_stream(tmp_path / "t.safetensors") is None


@pytest.mark.parametrize(
    ("tokens", "ends"), [(2, (2,)), (4, (4,)), (6, (4, 6)), (10, (4, 10)), (99, (4, 10))]
)
def test_only_the_first_tokens(tokens: int, ends: tuple[int, ...]) -> None:
    whole = TokenStream(np.arange(10), "x", StreamFacts(10, (4, 10)), "", ())
    first = cut(whole, tokens)
    assert first.facts.document_ends == ends and first.facts.n_tokens == len(first.ids_N) == min(tokens, 10)
    assert (first.sha256 == whole.sha256) == (tokens >= 10)


def test_defaults_are_the_protocols() -> None:
    assert settings_of(DataSpec(dataset="sample")).eval_len == 2048
    assert settings_of(DataSpec(dataset="sample", protocol="llama.cpp")).eval_len == 512
    assert settings_of(DataSpec(dataset="sample", max_rows=0)).max_rows is None
