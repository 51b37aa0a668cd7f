"""The gguf backend against llama-cpp-python's own high-level class and against known answers."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from backend_calls import score_one
from tiny_gguf import TINY_VOCAB, write_tiny

from evalq.backends import _llama, _llama_batch, _llama_plan, gguf
from evalq.engine.backend import LoadedModel, LoadRequest
from evalq.engine.failures import CATEGORIES
from evalq.engine.kv_cache import step_bounds
from evalq.errors import ModelError

GGUF = gguf.GgufBackend()

PROSE = " ".join(
    f"In {year} the {what} near {where} was {done}, and its keeper saw {n} ships before the {season} storms."
    for year, what, where, done, n, season in (
        (1874, "lighthouse", "Varde", "rebuilt in granite", 31, "autumn"),
        (1903, "signal mast", "the old harbour", "struck by lightning twice", 7, "winter"),
        (1821, "beacon", "Cape Torne", "lit with whale oil", 112, "first"),
        (1938, "fog horn", "a fishing village", "heard for nine miles", 54, "March"),
        (1790, "watch tower", "the salt marshes", "sold to a priest", 3, "equinox"),
        (1856, "pilot station", "the river mouth", "moved upstream on rollers", 240, "worst"),
        (1911, "weather hut", "Hill Farm", "painted red and white", 18, "spring"),
        (1967, "radio mast", "the northern reef", "switched to automatic", 0, "summer"),
        (1845, "stone pier", "Lundby", "finished after six years of work", 77, "great"),
        (1889, "rescue boat", "the sand banks", "given its first engine", 25, "December"),
    )
)
TOLERANCE_TOKEN_NATS, TOLERANCE_MEAN_NATS = 1e-3, 1e-4


@pytest.fixture(scope="session")
def prose_ids(smollm2_gguf: Path) -> np.ndarray:
    return np.array(gguf.load_tokenizer(smollm2_gguf).encode(PROSE), np.int64)


@pytest.fixture(scope="session")
def reference(smollm2_gguf: Path):
    """(ids, flash_attn) -> float64 log-softmax of every position, by Llama(logits_all=True)."""
    import llama_cpp

    models = {
        flash: llama_cpp.Llama(str(smollm2_gguf), n_ctx=512, logits_all=True, flash_attn=flash, verbose=False)
        for flash in (False, True)
    }

    def log_softmax(ids: np.ndarray, flash_attn: bool) -> np.ndarray:
        llm = models[flash_attn]
        llm.reset()
        llm.eval(ids.tolist())
        logits = np.array(llm.scores[: len(ids)], np.float64)
        top = logits.max(1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))

    yield log_softmax
    for llm in models.values():
        llm.close()


def loaded(path: Path, window_tokens: int, n_windows: int = 1, **options) -> LoadedModel:
    request = LoadRequest(path, window_tokens, window_tokens - 1, options, n_windows=n_windows)
    return GGUF.load(request)


def refusal(path: Path, window_tokens: int = 16, **options) -> ModelError:
    with pytest.raises(ModelError) as caught:
        GGUF.close(loaded(path, window_tokens, **options))
    assert caught.value.category in CATEGORIES
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.mark.engine
@pytest.mark.parametrize(
    ("n_rows", "n_tokens", "first_target", "options"),
    [
        (1, 300, 1, {}),
        (1, 300, 201, {}),
        (1, 150, 1, {"n_ubatch": 100, "threads": 1}),
        (1, 150, 1, {"flash_attn": False, "n_ubatch": 64}),
        (3, 97, 1, {}),
        (3, 97, 41, {"batch_windows": 3}),
        (3, 97, 41, {"flash_attn": False, "batch_windows": 3, "n_batch": 256, "n_ubatch": 100}),
        (5, 41, 8, {"batch_windows": 2}),
        (4, 60, 31, {"flash_attn": False, "batch_windows": 4, "n_batch": 128, "n_ubatch": 64}),
    ],
)
def test_agrees_with_the_high_level_class(
    smollm2_gguf, prose_ids, reference, n_rows, n_tokens, first_target, options
):
    ids = np.stack([prose_ids[i * 13 : i * 13 + n_tokens] for i in range(n_rows)])
    model = loaded(smollm2_gguf, n_tokens, n_rows, **options)
    scores = score_one(GGUF, model, ids, first_target)
    GGUF.close(model)
    assert scores["logprob"].dtype == np.float32 and scores["top1"].dtype == np.bool_
    assert scores["logprob"].shape == scores["top1"].shape == (n_rows, n_tokens - first_target)
    for row, logprob, top1 in zip(ids, scores["logprob"], scores["top1"], strict=True):
        expected = reference(row, options.get("flash_attn", True))[first_target - 1 : -1]
        targets = row[first_target:]
        own = expected[np.arange(len(targets)), targets]
        assert np.abs(logprob - own).max() < TOLERANCE_TOKEN_NATS
        assert abs(logprob.mean(dtype=np.float64) - own.mean()) < TOLERANCE_MEAN_NATS
        runner_up = np.partition(expected, -2, axis=1)[:, -2]
        clear = np.abs(own - np.where(own == expected.max(1), runner_up, expected.max(1))) > 0.2
        assert (top1 == (expected.argmax(1) == targets))[clear].all()
        assert 0 < top1.sum() < len(top1)


@pytest.mark.engine
@pytest.mark.parametrize("flash_attn", [False, True])
def test_batch_shape_changes_nothing_but_kernel_noise(smollm2_gguf, prose_ids, flash_attn):
    ids = np.stack([prose_ids[i * 31 : i * 31 + 150] for i in range(3)])
    results = []
    for shape in ({"batch_windows": 1}, {"batch_windows": 3}, {"batch_windows": 3, "n_batch": 400}):
        model = loaded(smollm2_gguf, 150, 3, flash_attn=flash_attn, **shape)
        results.append(score_one(GGUF, model, ids, 4))
        GGUF.close(model)
    for other in results[1:]:
        np.testing.assert_allclose(other["logprob"], results[0]["logprob"], atol=TOLERANCE_TOKEN_NATS)
        assert (other["top1"] == results[0]["top1"]).mean() > 0.99


@pytest.mark.engine
def test_rows_do_not_see_each_other_and_repeats_are_bit_identical(smollm2_gguf, prose_ids):
    model = loaded(smollm2_gguf, 64, 2, batch_windows=2)
    first, second, third = (prose_ids[i : i + 64] for i in (0, 100, 200))
    once = score_one(GGUF, model, np.stack([first, second]))
    other_neighbour = score_one(GGUF, model, np.stack([first, third]))
    again = score_one(GGUF, model, np.stack([first, second]))
    GGUF.close(model)
    np.testing.assert_array_equal(once["logprob"], again["logprob"])
    np.testing.assert_array_equal(once["top1"], again["top1"])
    np.testing.assert_array_equal(once["logprob"][0], other_neighbour["logprob"][0])
    assert not np.array_equal(once["logprob"][1], other_neighbour["logprob"][1])


@pytest.mark.engine
def test_memory_does_not_grow_with_the_number_of_forwards(smollm2_gguf, prose_ids):
    model = loaded(smollm2_gguf, 24)
    ids = prose_ids[None, :24]
    score_one(GGUF, model, ids)
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        score_one(GGUF, model, ids)
    grown = psutil.Process().memory_info().rss - before
    GGUF.close(model)
    assert grown < 2 * 2**20  # the logits of one window alone are 4.3 MiB


@pytest.mark.engine
def test_describes_the_model(smollm2_gguf, prose_ids):
    model = loaded(smollm2_gguf, 64)
    assert (model.vocab_size, model.max_positions) == (49152, 8192)
    assert model.dtype == "Q4_1"
    assert model.batch_windows == 1
    assert set(model.versions) == {"llama-cpp-python", "llama.cpp"}
    assert model.tokenize is not None
    assert model.tokenize(PROSE) == prose_ids.tolist()
    GGUF.close(model)
    GGUF.close(model)


@pytest.mark.engine
def test_tokenizer_without_weights(smollm2_gguf):
    import llama_cpp

    tokenizer = gguf.load_tokenizer(smollm2_gguf)
    llm = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    for text in (PROSE, "", "  two spaces\n\n\ttab é 漢字 🙂", "<|im_start|> is text here", "a\0b"):
        expected = llm.tokenize(text.encode(), add_bos=False, special=False)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text
    assert len(tokenizer.encode("<|im_start|>")) > 1
    assert (tokenizer.bos_id, tokenizer.eos_id) == (llm.token_bos(), llm.token_eos())
    assert (tokenizer.adds_bos, tokenizer.vocab_size) == (False, 49152)
    special = llm.tokenize(b"<|im_start|>", add_bos=False, special=True)
    assert len(special) == 1 and tokenizer.decode(special) == "<|im_start|>"
    assert len(tokenizer.decode(expected * 500)) > 500  # more than there is room for at first
    llm.close()


def test_tokenizer_asks_again_when_the_ids_do_not_fit(tiny):
    llama_cpp = _llama.engine()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = _llama.open_model(tiny, params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids = [ord(c) - ord("a") + 4 for c in "hello"]
    assert _llama.tokenize(vocab, "hello", capacity=1) == _llama.tokenize(vocab, "hello") == ids
    llama_cpp.llama_model_free(model)


def test_tokenizer_reports_bos(tiny):
    tokenizer = gguf.load_tokenizer(tiny.parent)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    encode = tokenizer.encode
    del tokenizer
    assert encode("ab") == [4, 5]


def test_a_flat_head_gives_the_logarithm_of_the_vocabulary(tmp_path):
    write_tiny(tmp_path / "flat.gguf", tokenizer="none", flat_head=True)
    model = loaded(tmp_path / "flat.gguf", 20, 2)
    scores = score_one(GGUF, model, np.arange(40).reshape(2, 20) % TINY_VOCAB, 6)
    GGUF.close(model)
    assert model.tokenize is None
    assert model.dtype == "all F32"
    np.testing.assert_allclose(scores["logprob"], -np.log(TINY_VOCAB), atol=1e-6)
    assert scores["top1"].all()


def test_windows_without_targets_give_empty_scores(tiny):
    model = loaded(tiny, 8)
    for n_tokens, first_target in ((1, 1), (8, 8), (8, 21)):
        scores = score_one(GGUF, model, np.zeros((2, n_tokens), np.int64), first_target)
        assert scores["logprob"].shape == scores["top1"].shape == (2, 0)
    GGUF.close(model)


def test_pieces_cover_a_window_evenly_and_fit_a_batch():
    for n_positions in range(1, 700, 7):
        for batch_windows, n_batch in ((1, 256), (3, 230), (256, 256)):
            plan = _llama_plan.Plan(1, batch_windows, n_batch, n_batch, 0, n_positions)
            bounds = step_bounds(n_positions, plan.n_batch // plan.batch_windows)
            sizes = np.diff(bounds)
            assert (bounds[0], bounds[-1]) == (0, n_positions)
            assert 1 <= sizes.min() and sizes.max() * batch_windows <= n_batch
            assert sizes.max() - sizes.min() <= 1
            if n_positions >= 128 <= n_batch // batch_windows:
                assert sizes.min() >= _llama_plan.FLASH_TILE_TOKENS


def test_split_files_score_as_the_whole(tiny, tmp_path):
    write_tiny(tmp_path / "parts.gguf", split=12)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert [p.name for p in parts] == ["parts-00001-of-00002.gguf", "parts-00002-of-00002.gguf"]
    ids = np.random.default_rng(1).integers(0, TINY_VOCAB, (2, 33))
    results = []
    for path in (tiny, parts[0], tmp_path):
        model = loaded(path, 33, 2)
        results.append(score_one(GGUF, model, ids)["logprob"])
        GGUF.close(model)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert refusal(parts[1]).category == "model_missing"
    parts[1].unlink()
    error = refusal(parts[0])
    assert error.category == "model_corrupt"
    assert "parts-00002-of-00002.gguf" in error.message


def test_damaged_files_are_named_with_the_engines_words(tiny, tmp_path):
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"this is no model" * 100)
    error = refusal(noise)
    assert error.category == "model_corrupt"
    assert "noise.gguf" in error.message and "magic" in error.message

    short = tmp_path / "short.gguf"
    short.write_bytes(tiny.read_bytes()[:-4096])
    error = refusal(short)
    assert error.category == "model_corrupt"
    assert "not within the file bounds" in error.message


def test_unknown_architecture_and_tensor_type_are_unsupported(tiny, tmp_path):
    write_tiny(tmp_path / "martian.gguf", arch="martian")
    error = refusal(tmp_path / "martian.gguf")
    assert error.category == "unsupported_format"
    assert "martian" in error.message

    content = bytearray(tiny.read_bytes())
    name = b"output.weight"
    dims = 2
    at = content.index((len(name)).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 8 * dims
    content[at : at + 4] = (250).to_bytes(4, "little")
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(content)
    error = refusal(odd)
    assert error.category == "unsupported_format"
    assert "invalid ggml type 250" in error.message


def test_a_directory_must_hold_one_model(tiny, tmp_path):
    assert refusal(tmp_path).category == "model_missing"
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny, tmp_path / name)
    error = refusal(tmp_path)
    assert error.category == "model_missing"
    assert "a.gguf, b.gguf" in error.message


def test_windows_longer_than_the_positions(tiny):
    GGUF.close(loaded(tiny, 65))
    error = refusal(tiny, 66)
    assert error.category == "window_too_long"
    assert "66" in error.message and "64" in error.message


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"batch_windows": 300},
        {"n_batch": 64, "n_ubatch": 128},
        {"tensor_split": [1.0] * 100},
        {"tensor_split": ["half"]},
        {"cache_type_v": "q8_0", "flash_attn": False},
    ],
)
def test_impossible_options(tiny, options):
    assert refusal(tiny, **options).category == "bad_option"


def test_an_overlay_is_refused(tiny):
    with pytest.raises(ModelError) as caught:
        GGUF.load(LoadRequest(tiny, 16, 15, {}, overlay=tiny))
    assert caught.value.category == "bad_option"


@pytest.mark.parametrize("options", [{"use_mmap": False}, {"cache_type_k": "q8_0"}, {"split_mode": "none"}])
def test_options_reach_the_engine(tiny, options):
    ids = np.random.default_rng(2).integers(0, TINY_VOCAB, (1, 40))
    results = []
    for chosen in ({}, options):
        model = loaded(tiny, 40, **chosen)
        results.append(score_one(GGUF, model, ids)["logprob"])
        GGUF.close(model)
    same = np.array_equal(results[0], results[1])
    assert same == (not any(_llama_plan.OPTIONS[name].numeric for name in options))
    assert np.abs(results[0] - results[1]).mean() < 0.3


def test_default_batch_fills_one_decode_with_short_windows(tiny):
    for window_tokens, n_windows, expected in ((33, 100, 16), (33, 3, 3), (64, 100, 8)):
        model = loaded(tiny, window_tokens, n_windows)
        assert model.batch_windows == expected
        GGUF.close(model)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from evalq.backends import _llama, gguf
from evalq.engine.backend import LoadRequest
from evalq.errors import ModelError
_llama.engine()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, -1))
options = {"batch_windows": 256, "n_batch": 65536, "threads": 1}
try:
    gguf.GgufBackend().load(LoadRequest(Path(sys.argv[1]), 64, 63, options, n_windows=256))
except ModelError as error:
    print(error.category, error.message)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits are Linux's")
def test_running_out_of_memory_while_loading(tiny):
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, tiny], capture_output=True, text=True)
    assert done.stdout.startswith("oom_load "), done


def test_a_missing_engine_says_how_to_install_it(tiny):
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from pathlib import Path; from evalq.backends import gguf\n"
        "from evalq.engine.backend import LoadRequest\n"
        "from evalq.errors import ModelError\n"
        "assert gguf.GgufBackend.options\n"
        "try: gguf.GgufBackend().load(LoadRequest(Path(sys.argv[1]), 8, 7, {}))\n"
        "except ModelError as error: print(error.category, error)"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("engine_missing")
    assert "pip install" in done.stdout


def test_the_engines_log_reaches_neither_stdout_nor_stderr(tiny, tmp_path, capfd):
    model = loaded(tiny, 20)
    score_one(GGUF, model, np.zeros((1, 20), np.int64))
    GGUF.close(model)
    (tmp_path / "empty.gguf").touch()
    refusal(tmp_path / "empty.gguf")
    assert capfd.readouterr() == ("", "")


def test_an_id_outside_the_vocabulary_is_the_engines_error(tiny):
    model = loaded(tiny, 20)
    with pytest.raises(ModelError) as caught:
        score_one(GGUF, model, np.full((1, 20), TINY_VOCAB))
    GGUF.close(model)
    assert caught.value.category == "engine_error"
    assert f"invalid token[0] = {TINY_VOCAB}" in caught.value.message


def test_row_scores_match_float64_and_pass_on_what_is_not_finite():
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((7, 5003)) * 6).astype(np.float32)
    targets = rng.integers(0, 5003, 7)
    targets[0] = logits[0].argmax()
    logits[4, 9], logits[5, 9] = np.nan, np.inf
    logits[6, :] = -np.inf
    kept = logits.copy()
    scores = _llama_batch.score_rows(logits, targets, ("logprob", "top1"))
    np.testing.assert_array_equal(logits, kept)
    exact = logits[:4].astype(np.float64)
    expected = exact[np.arange(4), targets[:4]] - np.log(np.exp(exact).sum(1))
    np.testing.assert_allclose(scores["logprob"][:4], expected, atol=4e-6)
    assert not np.isfinite(scores["logprob"][4:]).any()
    assert scores["top1"].tolist()[:4] == [True, False, False, False]


def test_row_scores_do_not_depend_on_threads():
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(4)
    logits = rng.standard_normal((11, 301)).astype(np.float32)
    targets = rng.integers(0, 301, 11)
    alone = _llama_batch.score_rows(logits, targets, ("logprob", "top1"))
    with ThreadPoolExecutor(3) as pool:
        for n_slices in (1, 3, 40):
            shared = _llama_batch.score_rows(logits, targets, ("logprob", "top1"), pool, n_slices)
            np.testing.assert_array_equal(shared["logprob"], alone["logprob"])
            np.testing.assert_array_equal(shared["top1"], alone["top1"])
