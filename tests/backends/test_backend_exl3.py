"""The exl3 backend: what it refuses, how it runs modules (on a toy engine), and the real engine on a GPU.

The tests marked `gpu` need a CUDA GPU, exllamav3 and a converted checkpoint:
EVALQ_TEST_EXL3=DIRECTORY pytest -m gpu tests/backends/test_backend_exl3.py
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_calls import score_batches, score_one
from checkpoints import make_tiny
from conftest import Runs
from safetensors import safe_open
from safetensors.numpy import save_file

from evalq.backends import _exl3_run, exl3
from evalq.backends._exl3_run import CHUNK_ROWS_MIN, INPUT_TOKENS_MIN, Handle, resident, streamed
from evalq.backends._exl3_tokenizer import JsonTokenizer
from evalq.checkpoint.headers import open_checkpoint
from evalq.engine.backend import Batch, LoadedModel, LoadRequest
from evalq.engine.failures import CATEGORIES
from evalq.errors import ModelError

EXL3 = exl3.Exl3Backend()

V, V_PADDED, H = 200, 256, 16


# What it refuses


def refusal(request: LoadRequest) -> ModelError:
    with pytest.raises(ModelError) as caught:
        EXL3.load(request)
    assert caught.value.category in CATEGORIES
    return caught.value


def test_without_the_engine_the_install_line_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "exllamav3", None)
    error = refusal(LoadRequest(tiny, 16, 15, {}))
    assert error.category == "engine_missing"
    assert "exllamav3 is not installed" in error.message and EXL3.install in (error.remedy or "")


def test_without_a_gpu_it_says_so_before_the_engine_is_imported(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "exllamav3.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from evalq.engine.backend import LoadRequest; from evalq.backends import exl3\n"
        "from evalq.errors import ModelError\n"
        "try: exl3.Exl3Backend().load(LoadRequest(pathlib.Path(sys.argv[2]), 16, 15, {}))\n"
        "except ModelError as error: print(error.category, error)"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "stub"), str(tiny)]
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=no_gpu, check=False)
    assert run.stdout.startswith("no_gpu exllamav3 needs a CUDA GPU"), run.stderr
    assert EXL3.install in run.stdout


def test_the_command_line_reports_it_as_a_failed_model(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, records = runs.compare(runs.data(), runs.models({"load_fn": "exllamav3", "fwd_fn": "exllamav3"}))
    assert code == 1
    assert records[0]["engine"] in ("exl3", "exllamav3")
    assert records[0]["error"]["category"] in ("engine_missing", "no_gpu")
    assert EXL3.install in records[0]["error"]["remedy"]


def test_a_file_is_no_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refusal(LoadRequest(tmp_path / "model.gguf", 16, 15, {})).category == "bad_option"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "cpu"}, "cpu"),
        ({"device": "cuda:x"}, "cuda:x"),
        ({"gpu_split": []}, "gpu_split"),
        ({"gpu_split": [0, 0]}, "gpu_split"),
        ({"gpu_split": [20, "24"]}, "gpu_split"),
        ({"gpu_split": [20, True]}, "gpu_split"),
        ({"gpu_split": [20, -1]}, "gpu_split"),
        ({"gpu_split": [20], "device": "cuda:0"}, "gpu_split"),
        ({"gpu_split": [20], "streaming": True}, "streaming"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        exl3._check_options(options)
    assert caught.value.category == "bad_option"


@pytest.mark.parametrize("options", [{"batch_windows": 0}, {"head_chunk_mib": -4}])
def test_numbers_below_the_smallest_are_named_before_a_model_is_loaded(
    runs: Runs, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = runs.compare(
        runs.data(), runs.models({"load_fn": "exl3", "fwd_fn": "exl3", "options": options})
    )
    errors = capsys.readouterr().err
    assert code == 2 and records == []
    assert f"options.{next(iter(options))}: should be 1 or more" in errors


@pytest.mark.parametrize(
    ("options", "loaded_with"),
    [
        ({}, {"device": torch.device("cuda:0")}),
        ({"device": "cuda"}, {"device": torch.device("cuda")}),
        ({"device": "cuda:3", "streaming": True}, None),
        (
            {"gpu_split": [20, 0.5, 0], "batch_windows": 3},
            {"use_per_device": [20, 0.5, 0], "max_chunk_size": 3 * 599, "max_output_size": 2**20 // (4 * V)},
        ),
    ],
)
def test_sensible_options_reach_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], loaded_with: dict[str, Any] | None
) -> None:
    engine = stand_in_engine(monkeypatch)
    model = EXL3.load(LoadRequest(tiny, 600, 599, {"head_chunk_mib": 1} | options))
    assert engine.loaded_with == loaded_with
    streaming_device = torch.device("cuda:3") if "streaming" in options else None
    assert model.handle.streaming_device == streaming_device
    assert model.handle.body == engine.modules[:-1] and model.handle.head is engine.modules[-1]
    assert [entry[0] for entry in engine.fwd_modules] == engine.modules[:-1]
    assert model.batch_windows == options.get("batch_windows", 2048 // 599)
    assert any("streamed" in note for note in model.notes) == bool(options.get("streaming"))
    assert (model.vocab_size, model.dtype, model.warm_up) == (V, "float16", "streaming" not in options)


def test_options_are_checked_by_the_command_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"gpu_split": "20,24"}
    models = runs.models({"load_fn": "exl3", "fwd_fn": "exl3", "options": options})
    code, _ = runs.compare(runs.data(), models)
    assert code == 2 and "options.gpu_split: should be list" in capsys.readouterr().err


# The tokenizer


def test_tokenizer_json_alone_gives_the_ids_of_transformers(smollm2: Any) -> None:
    from evalq.backends import hf

    folder = smollm2("bf16")
    alone, theirs = JsonTokenizer(folder), hf.load_tokenizer(folder)
    text = " It's 1,024 of 4 ½\n\n\n = = Café = = \t日本 <|im_start|>"
    for special in (False, True):
        assert alone.encode(text, special) == theirs.encode(text, special)
    ids = alone.encode(text, False)
    assert alone.decode(ids) == theirs.decode(ids) == text
    assert (alone.bos_id, alone.eos_id, alone.adds_bos) == (theirs.bos_id, theirs.eos_id, theirs.adds_bos)
    assert alone.vocab_size == theirs.vocab_size


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        JsonTokenizer(tmp_path)
    assert caught.value.category == "tokenizer_mismatch"


# How modules are run: an engine of three modules whose next-token distribution is a table


class Loader:
    """Counts what a module's loading is bracketed by."""

    def __init__(self) -> None:
        self.open = self.opened = 0

    def begin_deferred_load(self, arena: bool = True) -> None:
        self.open, self.opened = self.open + 1, self.opened + 1

    def end_deferred_load(self) -> None:
        self.open -= 1

    def close(self) -> None: ...


class Toy:
    """A module with exllamav3's interface. Embedding, a causal running mean, or the head, by `kind`."""

    def __init__(self, kind: str, weight: torch.Tensor) -> None:
        self.kind, self._weight = kind, weight
        self.weight: torch.Tensor | None = None
        self.caps = {"prefer_cpu": kind == "embedding", "logits_output": kind == "head"}
        self.loads, self.rows_seen = 0, []
        self.device: Any = None

    def can_defer_load(self) -> bool:
        return True

    def load(self, device: Any) -> None:
        self.weight, self.device, self.loads = self._weight, device, self.loads + 1

    def unload(self) -> None:
        self.weight = None

    def prepare_for_device(self, x: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor, params: dict[str, Any], out_dtype: Any = None) -> torch.Tensor:
        assert self.weight is not None, f"{self.kind} runs while it is not loaded"
        self.rows_seen.append(x.shape[:-1].numel())
        if self.kind == "embedding":
            return self.weight[x]
        if self.kind == "mean":
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None] @ self.weight
        assert params == {"reconstruct": True} and out_dtype is torch.float
        logits = x @ self.weight
        # The columns beyond the vocabulary are padding: large, so that forgetting to crop them shows.
        return torch.nn.functional.pad(logits, (0, V_PADDED - V), value=50.0)


class ToyModel:
    """What `resident` and `streamed` use of exllamav3's Model."""

    loaded_tp = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"embedding": (V, H), "mean": (H, H), "head": (H, V)}
        self.modules = [Toy(k, torch.randn(s, generator=generator)) for k, s in shapes.items()]
        self.fwd_modules = [(module, 0) for module in self.modules]
        self.config = types.SimpleNamespace(stc=Loader(), vocab_size=V, config_dict={})
        self.config.override_dynamic_seq_len = lambda tokens: None
        self.loaded_with: dict[str, Any] | None = None

    def load(self, **how: Any) -> None:
        self.loaded_with = how

    def prepare_inputs(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        assert params["attn_mode"] == "flash_attn_nc"
        params["seen"] = True
        return ids

    def forward(self, ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        assert "seen" not in params, "a dictionary is used twice"
        x = self.prepare_inputs(ids, params)
        for module in self.modules[:-1]:
            x = module.forward(x, params)
        return x

    def distributions(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-softmax [R, V] and targets [R] of each window by itself, float64, no padding."""
        embedding, mean, head = (module._weight.double() for module in self.modules)
        for ids in torch.from_numpy(batch.ids_BT):
            x = embedding[ids[:-1]]
            x = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None] @ mean
            yield (x @ head).log_softmax(-1)[batch.first_target - 1 :], ids[batch.first_target :]

    def expected(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and top-1, [rows]."""
        logprob, top1 = [], []
        for every, targets in self.distributions(batch):
            logprob.append(every.gather(1, targets[:, None])[:, 0])
            top1.append(every.argmax(-1) == targets)
        return torch.cat(logprob).numpy(), torch.cat(top1).numpy()


def stand_in_engine(monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    """The model that loading gives on a machine where torch sees a GPU and exllamav3 is installed."""
    model = ToyModel()
    package = types.ModuleType("exllamav3")
    package.__spec__ = importlib.machinery.ModuleSpec("exllamav3", None)
    package.Config = types.SimpleNamespace(from_directory=lambda path: model.config)  # type: ignore[attr-defined]
    package.Model = types.SimpleNamespace(from_config=lambda config: model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exllamav3", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("init", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return model


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Handle:
    kernels = types.ModuleType("exllamav3.modules.quant.exl3")
    kernels.MAX_RECONSTRUCT_SLICE_N = 32768  # type: ignore[attr-defined]
    quant = types.ModuleType("exllamav3.modules.quant")
    quant.exl3 = kernels  # type: ignore[attr-defined]
    for name in ("exllamav3", "exllamav3.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, quant.__name__, quant)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    model = ToyModel()
    return Handle(model, model.modules[:-1], model.modules[-1], V, CHUNK_ROWS_MIN, None, False, [])


def batches_of(*sizes: tuple[int, int, int]) -> list[Batch]:
    rng = np.random.default_rng(5)
    return [Batch(rng.integers(0, V, (n, length)), first) for n, length, first in sizes]


CASES = [(1, 300, 1), (3, 700, 501), (2, 40, 11), (1, 2, 1), (1, 513, 512)]


def test_resident_scores_are_the_models(toy: Handle) -> None:
    for module in toy.model.modules:
        module.load("toy")
    batches, hits = batches_of(*CASES), 0
    for batch, found in zip(batches, resident(toy, batches), strict=True):
        wanted, wanted_top1 = toy.model.expected(batch)
        assert set(found) == {"logprob", "top1"}
        assert np.allclose(found["logprob"].numpy(), wanted, atol=2e-5)
        assert np.array_equal(found["top1"].numpy(), wanted_top1)
        hits += int(wanted_top1.sum())
    assert hits > 0
    assert min(toy.body[1].rows_seen) >= INPUT_TOKENS_MIN
    assert 32 < min(toy.head.rows_seen) and max(toy.head.rows_seen) <= CHUNK_ROWS_MIN


def test_streaming_loads_every_module_once_and_changes_no_score(toy: Handle) -> None:
    batches = batches_of(*CASES)
    toy.streaming_device = torch.device("cpu")
    found = list(streamed(toy, batches))
    loader: Loader = toy.model.config.stc
    assert [module.loads for module in toy.model.modules] == [1, 1, 1] and loader.open == 0
    assert all(module.weight is None for module in toy.model.modules)
    for module in toy.model.modules:
        module.load("toy")
    for mine, theirs in zip(found, resident(toy, batches), strict=True):
        assert set(mine) == set(theirs) == {"logprob", "top1"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_entropy_is_that_of_the_whole_distribution_and_changes_no_other_column(toy: Handle) -> None:
    for module in toy.model.modules:
        module.load("toy")
    plain = batches_of(*CASES)
    asked = [replace(batch, columns=("logprob", "top1", "entropy")) for batch in plain]
    for batch, without, found in zip(plain, resident(toy, plain), resident(toy, asked), strict=True):
        every = torch.cat([every for every, _ in toy.model.distributions(batch)])
        wanted = -(every.exp() * every).sum(-1).numpy()
        assert np.allclose(found.pop("entropy").numpy(), wanted, atol=2e-5)
        assert all(torch.equal(found[name], without[name]) for name in without)


def test_streaming_that_is_given_up_leaves_no_module_loaded(toy: Handle) -> None:
    toy.streaming_device = torch.device("cpu")
    scores = streamed(toy, batches_of((1, 300, 1), (1, 300, 1)))
    next(scores)
    assert toy.head.weight is not None
    scores.close()
    assert toy.head.weight is None


def test_the_engines_slice_width_is_restored(toy: Handle) -> None:
    kernels = sys.modules["exllamav3.modules.quant.exl3"]
    with pytest.raises(ZeroDivisionError), _exl3_run._narrow_slices(4096):
        assert kernels.MAX_RECONSTRUCT_SLICE_N == 1536
        raise ZeroDivisionError
    assert kernels.MAX_RECONSTRUCT_SLICE_N == 32768


# Bits


def test_bits_of_an_exl3_directory_are_counted_from_its_headers(tmp_path: Path) -> None:
    """One 256 x 128 layer at 3 bits and a 128 x 256 head at 6, with their sign vectors."""
    folder = make_tiny(tmp_path / "model", quantization_config={"quant_method": "exl3", "bits": 3.0})

    def linear(name: str, rows: int, columns: int, bits: int) -> dict[str, np.ndarray]:
        return {
            f"{name}.trellis": np.zeros((rows // 16, columns // 16, 16 * bits), np.int16),
            f"{name}.suh": np.zeros(rows, np.float16),
            f"{name}.svh": np.zeros(columns, np.float16),
        }

    tensors = linear("model.layers.0.mlp.up_proj", 256, 128, 3) | linear("lm_head", 128, 256, 6)
    save_file(tensors | {"model.norm.weight": np.ones(256, np.float16)}, folder / "model.safetensors")
    report = open_checkpoint(folder).storage
    assert report.layer_bpw == pytest.approx(3 + 16 * (256 + 128) / (256 * 128))
    assert report.head_bpw == pytest.approx(6 + 16 * (256 + 128) / (256 * 128))


# The real engine


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    if not torch.cuda.is_available() or importlib.util.find_spec("exllamav3") is None:
        pytest.skip("no CUDA GPU with exllamav3")
    if "EVALQ_TEST_EXL3" not in os.environ:
        pytest.skip("EVALQ_TEST_EXL3 does not name a converted checkpoint")
    return Path(os.environ["EVALQ_TEST_EXL3"])


def loaded(path: Path, overlay: Path | None = None, **options: Any) -> LoadedModel:
    return EXL3.load(LoadRequest(path, 600, 599, options, overlay=overlay, n_windows=3))


@pytest.fixture(scope="session")
def real(checkpoint: Path) -> LoadedModel:
    return loaded(checkpoint)


@pytest.fixture(scope="session")
def ids(checkpoint: Path) -> np.ndarray:
    from importlib import resources

    text = resources.files("evalq.data").joinpath("sample.txt").read_text(encoding="utf-8")
    return np.array(exl3.load_tokenizer(checkpoint).encode(text, False)[: 3 * 600], np.int64).reshape(3, 600)


engine = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.filterwarnings("default")]


class TestEngine:
    pytestmark = engine

    def test_scores_are_those_of_the_engines_own_logits(self, checkpoint: Path, ids: np.ndarray) -> None:
        from exllamav3 import Config, Model

        model = Model.from_config(Config.from_directory(str(checkpoint)))
        model.load(device=torch.device("cuda:0"))
        logits = model.forward(torch.from_numpy(ids), {"attn_mode": "flash_attn_nc"})
        wanted = logits[..., : model.config.vocab_size].double().log_softmax(-1)[:, :-1]
        targets = torch.from_numpy(ids[:, 1:, None]).to(wanted.device)
        found = score_one(EXL3, loaded(checkpoint), ids)
        difference = found["logprob"] - wanted.gather(-1, targets)[..., 0].cpu().numpy()
        # float16 logits are 1/64 apart at 16: that is the engine's own rounding, not a difference of models.
        assert abs(difference.mean()) < 1e-3 and abs(difference).max() < 0.05
        agree = (wanted.argmax(-1) == targets[..., 0]).cpu().numpy() == found["top1"]
        assert agree.mean() > 0.995

    def test_streaming_gives_the_same_scores(
        self, checkpoint: Path, real: LoadedModel, ids: np.ndarray
    ) -> None:
        streaming = loaded(checkpoint, streaming=True)
        batches = [Batch(ids[:1], 1), Batch(ids[1:], 1)]
        whole = [scores["logprob"] for scores in score_batches(EXL3, real, batches)]
        parts = [scores["logprob"] for scores in score_batches(EXL3, streaming, batches)]
        for one, other in zip(whole, parts, strict=True):
            assert np.allclose(one, other, atol=0.02) and abs((one - other).mean()) < 2e-4

    def test_a_graph_gives_the_scores_of_single_launches(self, checkpoint: Path, ids: np.ndarray) -> None:
        rows = [np.roll(ids[i % 3], 7 * i)[None] for i in range(8)]
        batches = [*(Batch(row, 1) for row in rows), Batch(ids[:1, :300], 101), Batch(rows[0], 1)]
        graph, single = loaded(checkpoint), loaded(checkpoint, cuda_graph=False)
        found = [scores["logprob"] for scores in score_batches(EXL3, graph, batches)]
        wanted = [scores["logprob"] for scores in score_batches(EXL3, single, batches)]
        assert graph.notes == [] and graph.handle.replay is not None, "nothing was recorded"
        for one, other in zip(found, wanted, strict=True):
            assert np.allclose(one, other, atol=0.02) and abs((one - other).mean()) < 2e-4

    def test_the_first_tokens_do_not_depend_on_the_window(self, real: LoadedModel, ids: np.ndarray) -> None:
        whole = score_one(EXL3, real, ids[:1])["logprob"]
        for length in (2, 20, 200):
            part = score_one(EXL3, real, ids[:1, :length])["logprob"]
            assert np.allclose(part, whole[:, : length - 1], atol=0.05)

    def test_start_batch_and_chunk_do_not_matter(self, checkpoint: Path, real: LoadedModel, ids: Any) -> None:
        whole = score_one(EXL3, real, ids)["logprob"]
        assert np.allclose(score_one(EXL3, real, ids, 571)["logprob"], whole[:, 570:], atol=0.05)
        one_by_one = np.concatenate([score_one(EXL3, real, ids[i : i + 1])["logprob"] for i in range(3)])
        assert np.allclose(one_by_one, whole, atol=0.05)
        chunked = score_one(EXL3, loaded(checkpoint, head_chunk_mib=400), ids)["logprob"]
        assert np.allclose(chunked, whole, atol=0.05)

    def test_an_overlay_replaces_tensors(self, checkpoint: Path, ids: np.ndarray, tmp_path: Path) -> None:
        """A final norm of zeros makes every logit zero, so every token has probability 1/V."""
        tensors: dict[str, np.ndarray] = {}
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                if "model.norm.weight" in opened.keys():
                    tensors["model.norm.weight"] = opened.get_tensor("model.norm.weight").half().numpy() * 0
        save_file(tensors, tmp_path / "norm.safetensors")
        model = loaded(checkpoint, overlay=tmp_path)
        assert np.allclose(score_one(EXL3, model, ids)["logprob"], -np.log(model.vocab_size), atol=1e-5)

    def test_bits_are_the_engines(self, checkpoint: Path, real: LoadedModel) -> None:
        layer_bpw, head_bpw, _ = real.handle.model.get_storage_info()
        report = open_checkpoint(checkpoint).storage
        assert report.layer_bpw == pytest.approx(layer_bpw, abs=5e-5)
        assert report.head_bpw == pytest.approx(head_bpw, abs=5e-5)
