"""vLLM's columns beyond log-probability: the runner's order of calls, and the real engine on a CPU."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Runs
from safetensors.numpy import load_file, save_file
from vllm_runs import PYTHON, VllmRuns, engine

from evalq.backends import hf
from evalq.backends._torch_reference import TorchReference
from evalq.backends._vllm_columns import MORE
from evalq.backends._vllm_runners import listen
from evalq.backends._vllm_tap import Expected, Tap
from evalq.backends._vllm_worker import ScoringExtension
from evalq.engine.backend import Batch, LoadRequest
from evalq.engine.columns import DISTRIBUTION_COLUMNS, REFERENCE_ROWS
from evalq.engine.reference import ReferenceHead, StoredWeight, pack_float32, unpack_float32

COLUMNS = ("logprob", *(column.name for column in MORE))
V, D = 50, 8


class Sampler(torch.nn.Module):
    """The part of vLLM's sampler that the runner below calls."""

    @staticmethod
    def gather_logprobs(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        return logprobs.gather(-1, token_ids[:, None])[:, 0].clone()


class Runner:
    """The order of calls of vLLM's first model runner: chunks of several requests in a step.

    For what the engine does only by bad luck: a request that begins again, one that nobody asked about.
    """

    device = torch.device("cpu")

    def __init__(self, hidden: dict[str, Any], head: Any, ids: dict[str, list[int]]) -> None:
        self.hidden, self.head, self.sampler = hidden, head, Sampler()
        self.num_prompt_logprobs = dict.fromkeys(ids, 0)
        self.requests = {
            name: SimpleNamespace(prompt_token_ids=tokens, num_computed_tokens=0)
            for name, tokens in ids.items()
        }
        self.returned: dict[str, dict[int, float]] = {name: {} for name in ids}

    def step(self, **n_tokens: int) -> None:
        """So many tokens of each request."""
        self._get_prompt_logprobs_dict(torch.zeros(1), n_tokens)
        for name, count in n_tokens.items():
            self.requests[name].num_computed_tokens += count

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> None:
        for name in list(self.num_prompt_logprobs):
            count = num_scheduled_tokens.get(name)
            if count is None:
                continue
            request = self.requests[name]
            start = request.num_computed_tokens
            left = len(request.prompt_token_ids) - start - 1
            n_logits = count if count <= left else left
            if count > left:
                del self.num_prompt_logprobs[name]
            if n_logits <= 0:
                continue
            scores = (self.hidden[name][start : start + n_logits] @ self.head.T).log_softmax(-1)
            targets = torch.tensor(request.prompt_token_ids[start + 1 : start + 1 + n_logits])
            found = self.sampler.gather_logprobs(scores, 0, targets)
            for i, value in enumerate(found.tolist()):
                self.returned[name][start + i] = value


@pytest.fixture
def reference(tmp_path: Path) -> TorchReference:
    weight = np.random.default_rng(1).normal(size=(V - 3, D)).astype(np.float32)
    file = tmp_path / "weight.bin"
    file.write_bytes(weight.tobytes())
    head = ReferenceHead(
        kind="hidden",
        dtype="float32",
        width=D,
        vocab_size=V - 3,
        weight=StoredWeight.found(file, 0, "float32", (V - 3, D)),
    )
    return TorchReference(head, "cpu")


def windows_of(ids: dict[str, list[int]], folder: Path, first: int) -> list[list[Any]]:
    """Announced windows, with rows of a reference in files."""
    rng, found = np.random.default_rng(2), []
    for name, tokens in ids.items():
        targets = tokens[first:]
        file = folder / f"{name}.safetensors"
        save_file({"rows": pack_float32(rng.normal(size=(len(targets), D)).astype(np.float32))}, file)
        found.append([name, targets, first, str(file), False])
    return found


def expected(runner: Runner, name: str, window: list[Any], reference: TorchReference) -> dict[str, Any]:
    """Float64, over the vocabulary that both share."""
    _, targets, first, file, _ = window
    n_targets = len(targets)
    q = (
        runner.hidden[name][first - 1 : first - 1 + n_targets].double() @ runner.head.double().T
    ).log_softmax(-1)
    rows = torch.from_numpy(unpack_float32(load_file(file)["rows"]))
    p = (rows.double() @ reference._weight_Vd.double().T).log_softmax(-1)
    q_shared = q[:, : V - 3].log_softmax(-1)
    return {
        "kld": (p.exp() * (p - q_shared)).sum(-1).numpy(),
        "acceptance": torch.minimum(p.exp(), q_shared.exp()).sum(-1).numpy(),
        "entropy": -(q.exp() * q).sum(-1).numpy(),
        "argmax": q.argmax(-1).numpy(),
        "logprob": q.gather(-1, torch.tensor(targets)[:, None])[:, 0].numpy(),
    }


def check(tap: Tap, runner: Runner, window: list[Any], reference: TorchReference, request: str) -> None:
    name = window[0]
    found = tap.take([name], Path("unused"))[name]
    for column, wanted in expected(runner, request, window, reference).items():
        dtype = np.int32 if column == "argmax" else np.float32
        np.testing.assert_allclose(np.frombuffer(found[column], dtype), wanted, rtol=1e-5, atol=1e-5)


def case(tmp_path: Path, first: int, names: tuple[str, ...] = ("0-ab12cd34", "1-ab12cd34")) -> Any:
    """A runner with two requests, windows announced for both."""
    rng = torch.Generator().manual_seed(3)
    ids = {name: torch.randint(V - 3, (20,), generator=rng).tolist() for name in names}
    hidden = {name: torch.randn(20, D, generator=rng) for name in names}
    runner = Runner(hidden, torch.randn(V, D, generator=rng), ids)
    plain = {name.partition("-")[0]: tokens for name, tokens in ids.items()}
    return runner, windows_of(plain, tmp_path, first)


def listening(
    runner: Any, reference: TorchReference, windows: list[list[Any]], chunk_bytes: int = 2**20
) -> Tap:
    """A tap on a runner, which expects these windows."""
    tap = Tap(runner.device, COLUMNS, reference, chunk_bytes)
    assert listen(runner, tap)
    tap.expect([Expected(*window) for window in windows], [])
    return tap


class SecondRunner:
    """vLLM's second model runner: the rows of a step, all requests one after another, in chunks of 7 rows.

    vLLM's own needs a GPU. `logits` keeps what each chunk was given, to see that nobody overwrites it.
    """

    device = torch.device("cpu")

    def __init__(self, hidden: dict[str, Any], head: Any, ids: dict[str, list[int]]) -> None:
        self.hidden, self.head, self.requests = hidden, head, ids
        self.done = dict.fromkeys(ids, 0)
        self.logits: list[tuple[Any, Any]] = []
        self.prompt_logprobs_worker: Any = SimpleNamespace(compute_prompt_logprobs=self._chunks)

    def step(self, **n_tokens: int) -> None:
        """So many tokens of each request."""
        names = list(n_tokens)
        rows = [self.hidden[name][self.done[name] : self.done[name] + n_tokens[name]] for name in names]
        batch = SimpleNamespace(
            req_ids=names,
            num_computed_prefill_tokens_np=np.array([self.done[name] for name in names]),
            num_scheduled_tokens=np.array(list(n_tokens.values())),
            query_start_loc_np=np.cumsum([0, *n_tokens.values()]),
        )
        self.prompt_logprobs_worker.compute_prompt_logprobs(self._logits, torch.cat(rows), batch)
        for name, count in n_tokens.items():
            self.done[name] += count

    def _logits(self, rows_nd: Any) -> Any:
        return rows_nd @ self.head.T

    def _chunks(self, logits_fn: Any, hidden_nd: Any, batch: Any) -> None:
        for first in range(0, len(hidden_nd), 7):
            rows = hidden_nd[first : first + 7]
            self.logits.append((logits_fn(rows), self._logits(rows)))


@pytest.mark.parametrize("first", [1, 7, 19])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_chunks_across_requests_of_the_second_runner(
    tmp_path: Path, reference: TorchReference, first: int, chunk_bytes: int
) -> None:
    model, windows = case(tmp_path, first)
    ids = {name: request.prompt_token_ids for name, request in model.requests.items()}
    a, b = list(ids)
    runner = SecondRunner(model.hidden | {"other": model.hidden[a]}, model.head, ids | {"other": ids[a]})
    tap = listening(runner, reference, windows, chunk_bytes)
    for counts in ({a: 6, "other": 4, b: 3}, {b: 5}, {a: 14, b: 12}, {a: 1}):
        runner.step(**counts)
    for window, request in zip(windows, (a, b), strict=True):
        check(tap, runner, window, reference, request)
    for given, own in runner.logits:
        np.testing.assert_array_equal(given.numpy(), own.numpy())


def test_windows_given_up_may_be_gone_already(tmp_path: Path, reference: TorchReference) -> None:
    runner, windows = case(tmp_path, 2)
    tap = listening(runner, reference, windows)
    runner.step(**dict.fromkeys(runner.requests, 20))
    tap.take(["0"], tmp_path)
    tap.expect([Expected("2", *windows[0][1:])], ["0", "1"])
    assert tap.window("1") is None and tap.window("2") is not None


@pytest.mark.parametrize("first", [1, 7, 19])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_chunks_of_several_requests_in_a_step(
    tmp_path: Path, reference: TorchReference, first: int, chunk_bytes: int
) -> None:
    runner, windows = case(tmp_path, first)
    tap = listening(runner, reference, windows, chunk_bytes)
    a, b = list(runner.requests)
    for counts in ({a: 6, b: 3}, {b: 5}, {a: 13, b: 12}, {a: 1}):
        runner.step(**counts)
    assert [len(returned) for returned in runner.returned.values()] == [19, 19]
    for window, request in zip(windows, (a, b), strict=True):
        check(tap, runner, window, reference, request)
    assert tap.window(a) is None and tap.window(b) is None


def test_a_request_that_begins_again_and_one_that_nobody_asked_about(
    tmp_path: Path, reference: TorchReference
) -> None:
    runner, (window, _) = case(tmp_path, 2)
    tap = listening(runner, reference, [window])
    a, b = list(runner.requests)
    runner.step(**{a: 9, b: 20})
    runner.requests[a].num_computed_tokens = 0  # preempted: all of it is computed again
    runner.step(**{a: 12})
    runner.step(**{a: 8})
    check(tap, runner, window, reference, a)


def test_what_goes_wrong_in_the_worker_is_told_when_the_results_are_asked_for(
    tmp_path: Path, reference: TorchReference
) -> None:
    """An exception inside the engine's step would end the engine."""
    runner, windows = case(tmp_path, 2)
    Path(windows[0][3]).write_bytes(Path(windows[0][3]).read_bytes()[:40])
    tap = listening(runner, reference, windows)
    a, b = list(runner.requests)
    runner.step(**{a: 20, b: 20})
    assert len(runner.returned[b]) == 19
    message, category, remedy = tap.take(["0"], tmp_path)["failure"]
    assert "0.safetensors" in message and category == "model_missing" and "run again" in remedy


def test_tokens_without_a_distribution_are_an_error(tmp_path: Path, reference: TorchReference) -> None:
    runner, (window, _) = case(tmp_path, 2)
    tap = listening(runner, reference, [window])
    runner.step(**{next(iter(runner.requests)): 9})
    message, category, _ = tap.take(["0"], tmp_path)["failure"]
    assert "8 of 18 tokens" in message and category == "engine_error"


def test_only_the_worker_with_the_head_answers() -> None:
    worker = ScoringExtension()
    worker.evalq_expect([["0", [7, 3], 1, "", False]], [])
    assert worker.evalq_take(["0"], "unused") is None


class Kept:
    """Rows of the unquantized SmolLM2 in float32 for a few windows, made by transformers."""

    FIRST = 40

    def __init__(self, folder: Path, smollm2: Any) -> None:
        self.folder, self.smollm2 = folder, smollm2
        path = smollm2("bf16")
        text = (ROOT / "evalq" / "data" / "sample.txt").read_text()
        ids = hf.load_tokenizer(path, False).encode(text[:4000], False)
        self.ids = np.array(ids[: 3 * 160], np.int64).reshape(3, 160)
        request = LoadRequest(path, 160, 120, {"dtype": "float32"}, columns=("logprob", REFERENCE_ROWS))
        model = hf.HfBackend().load(request)
        assert model.reference_head is not None
        self.head = model.reference_head
        batches = [Batch(ids_T[None], self.FIRST, ("logprob", REFERENCE_ROWS)) for ids_T in self.ids]
        scores = list(hf.HfBackend().score(model, batches))
        self.logprob = np.concatenate([one["logprob"] for one in scores])
        self.rows = np.concatenate([one[REFERENCE_ROWS] for one in scores])
        np.save(folder / "ids.npy", self.ids)
        np.save(folder / "rows.npy", self.rows)

    def by_transformers(self, name: str) -> Any:
        """KLD of a checkpoint in float32, [W, R]."""
        request = LoadRequest(
            self.smollm2(name), 160, 120, {"dtype": "float32"}, columns=COLUMNS, reference=self.head
        )
        model = hf.HfBackend().load(request)
        batch = Batch(self.ids, self.FIRST, ("kld",), {"reference": self.rows})
        (scores,) = hf.HfBackend().score(model, [batch])
        return scores["kld"]

    def scored(self, name: str, columns: tuple[str, ...] = COLUMNS, **asked: Any) -> dict[str, Any]:
        """What vLLM says of the windows, in its own environment."""
        out = self.folder / "out.npz"
        asked = {
            "model": str(self.smollm2(name)),
            "options": {},
            "columns": columns,
            "ids": str(self.folder / "ids.npy"),
            "first_target": self.FIRST,
            "head": self.head.model_dump(),
            "rows": str(self.folder / "rows.npy"),
            "out": str(out),
        } | asked
        file = self.folder / "asked.json"
        file.write_text(json.dumps(asked))
        script = ROOT / "tests" / "support" / "vllm_columns.py"
        subprocess.run([PYTHON, script, file], check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        with np.load(out, allow_pickle=False) as found:
            return dict(found)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept"), smollm2)


def exactly(found: dict[str, Any]) -> None:
    """Every token as float64 has it from the same logits."""
    for name in ("kld", "acceptance", "entropy", "logprob"):
        exact = found[f"exact_{name}"]
        np.testing.assert_allclose(found[name], exact, rtol=1e-3, atol=1e-5, err_msg=name)
        assert found[name].mean(dtype=np.float64) == pytest.approx(exact.mean(), rel=1e-3, abs=1e-6), name


@engine
@pytest.mark.filterwarnings("default")
def test_kld_is_what_float64_makes_of_the_same_logits_in_any_chunks(kept: Kept) -> None:
    found = kept.scored("int4", exact=True)
    exactly(found)
    assert found["pieces"] == 3
    np.testing.assert_allclose(found["reference_logprob"], kept.logprob, atol=2e-3)
    assert found["kld"].mean() > 0.01 and found["argmax"].dtype == np.int32
    # Its kernel for CPUs computes in bfloat16, transformers in float32.
    assert found["kld"].mean() == pytest.approx(kept.by_transformers("int4").mean(), rel=0.03)

    chunked = kept.scored("int4", exact=True, options={"max_num_batched_tokens": 64})
    exactly(chunked)
    assert chunked["pieces"] > 6
    # The kernel computes in bfloat16, whose rounding depends on the number of rows.
    assert chunked["kld"].mean() == pytest.approx(found["kld"].mean(), rel=0.02)
    assert np.corrcoef(chunked["kld"].ravel(), found["kld"].ravel())[0, 1] > 0.99


@engine
def test_windows_given_up_leave_nothing_behind(kept: Kept) -> None:
    """In float32, where the number of rows makes no difference worth a name."""
    chunks = {"dtype": "float32", "max_num_batched_tokens": 64}
    found = kept.scored("bf16", exact=True, give_up=True, options=chunks)
    exactly(found)
    assert found["kld"].mean() < 1e-6
    np.testing.assert_allclose(found["logprob"], kept.logprob, atol=1e-3)


@engine
def test_columns_of_its_own_need_no_reference(kept: Kept) -> None:
    own = ("logprob", "top1", *DISTRIBUTION_COLUMNS)
    found = kept.scored("bf16", own, head=None, rows=None, options={"dtype": "float32"})
    assert set(found["given"]) == set(own)
    plain = kept.scored("bf16", ("logprob", "top1"), head=None, rows=None, options={"dtype": "float32"})
    np.testing.assert_array_equal(found["logprob"], plain["logprob"])
    np.testing.assert_array_equal(found["top1"], plain["top1"])
    assert set(plain["given"]) == {"logprob", "top1"}
    targets = kept.ids[:, kept.FIRST :]
    np.testing.assert_array_equal(found["argmax"] == targets, found["top1"])
    # The most probable token's probability bounds the entropy from both sides.
    assert (found["entropy"] >= -np.log(found["max_prob"]) - 1e-5).all()


@engine
def test_reference_with_another_vocabulary_shares_its_beginning(kept: Kept, tmp_path: Path) -> None:
    """The same rows, and a head with fewer tokens."""
    weight = kept.head.weight
    assert weight is not None
    fewer = StoredWeight.found(Path(weight.file), weight.offset, weight.dtype, (40_000, weight.columns))
    head = kept.head.model_copy(update={"weight": fewer, "vocab_size": 40_000})
    ids = np.minimum(kept.ids, 39_999)
    np.save(tmp_path / "ids.npy", ids)
    found = kept.scored("bf16", head=head.model_dump(), ids=str(tmp_path / "ids.npy"))
    assert np.isfinite(found["kld"]).all() and (found["kld"] > -1e-5).all()


def kld(record: dict[str, Any]) -> float:
    value: float = record["against_reference"]["metrics"]["kld"]["value"]
    return value


@pytest.fixture
def real(runs: Runs, smollm2: Any) -> VllmRuns:
    return VllmRuns(runs, smollm2)


@engine
def test_a_reference_in_vllm_is_as_good_as_one_in_transformers(real: VllmRuns) -> None:
    """The same model in the other engine is the null control; INT4 is as far away in both engines."""
    models = real.runs.models(
        real.model("vllm", "bf16", dtype="float32") | {"reference": True},
        real.model("hf", "bf16", dtype="float32"),
        real.model("vllm", "int4"),  # its kernel for CPUs computes in bfloat16 only
        real.model("hf", "int4", dtype="float32"),
    )
    code, records = real.runs.compare(real.data, models, more=("--kld",))
    assert code == 0, [record["error"] for record in records]
    control, vllm_int4, hf_int4 = map(kld, records[1:])
    assert abs(control) < 1e-6
    assert hf_int4 > 0.01 and vllm_int4 == pytest.approx(hf_int4, rel=0.03)
