"""vLLM: what it returns, what it is told, what it says when it cannot; the real engine on a CPU."""

import logging
import logging.config
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from backend_calls import score_batches, score_one
from conftest import ROOT, Runs
from lora_adapters import merged, write_peft
from vllm_runs import VllmRuns, engine

from evalq.backends import vllm
from evalq.backends._vllm_engine import AccuracyWarnings, numerics_notes, start_error
from evalq.backends._vllm_memory import used_memory
from evalq.backends._vllm_options import OPTIONS, Hardware, cpu_kv_gib, engine_arguments
from evalq.backends._vllm_scores import from_prompt_logprobs, from_token_id_logprobs
from evalq.engine.backend import Batch, LoadedModel, LoadRequest
from evalq.engine.reference import ReferenceHead, StoredWeight
from evalq.errors import ModelError
from evalq.run.checks import given_columns

VLLM = vllm.VllmBackend()
IDS = np.array([7, 3, 9, 4, 5], np.int64)
LOGPROBS = [-1.5, -0.1, -2.0, -float("inf")]
RANKS = [3, 1, 2, 50]
CPU = Hardware(True, 1, 16 * 2**30, "x86_64", None)
H200 = Hardware(False, 2, 140 * 2**30, "NVIDIA H200", (9, 0))
RTX = Hardware(False, 1, 12 * 2**30, "NVIDIA GeForce RTX 3060", (8, 6))
KNOWN = {name for name in OPTIONS if name not in ("threads", "kv_cache_gib", "swap_space")} | {
    "model",
    "trust_remote_code",
    "enable_prefix_caching",
    "skip_tokenizer_init",
    "logprobs_mode",
    "disable_log_stats",
    "kv_cache_memory_bytes",
}


class Flat:
    """vLLM's FlatLogprobs: ranges of entries per position, position 0 empty."""

    def __init__(self, ids: list[int], per_position: int = 1) -> None:
        self.start_indices = [0] + [i * per_position for i in range(len(LOGPROBS))]
        self.end_indices = [0] + [(i + 1) * per_position for i in range(len(LOGPROBS))]
        self.token_ids = [x for token in ids for x in [token, 999][:per_position]]
        self.logprobs = [x for value in LOGPROBS for x in [value, -9.0][:per_position]]
        self.ranks = [x for rank in RANKS for x in [rank, 1][:per_position]]

    def __len__(self) -> int:
        return len(self.start_indices)


def dictionaries(ids: list[int]) -> list[Any]:
    entries = [SimpleNamespace(logprob=x, rank=r) for x, r in zip(LOGPROBS, RANKS, strict=True)]
    best = SimpleNamespace(logprob=-0.01, rank=1)
    return [None, *({token: entry, 999: best} for token, entry in zip(ids, entries, strict=True))]


@pytest.mark.parametrize(
    "found", [Flat([3, 9, 4, 5]), Flat([3, 9, 4, 5], per_position=2), dictionaries([3, 9, 4, 5])]
)
@pytest.mark.parametrize("start", [0, 2])
def test_element_i_is_the_token_i_given_those_before(found: Any, start: int) -> None:
    scores = from_prompt_logprobs(found, IDS, start)
    assert set(scores) == {"logprob", "top1"}
    assert scores["logprob"].dtype == np.float32 and scores["logprob"].shape == (4 - start,)
    np.testing.assert_array_equal(scores["logprob"], np.float32(LOGPROBS)[start:])
    assert scores["top1"].tolist() == [False, True, False, False][start:]


@pytest.mark.parametrize("found", [Flat([3, 9, 8, 5]), dictionaries([3, 9, 8, 5])])
def test_another_token_than_the_windows_is_refused(found: Any) -> None:
    with pytest.raises(ModelError, match=r"scored token 8 where the window has 4 \(position 3\), 1 of 4"):
        from_prompt_logprobs(found, IDS, 0)


def test_missing_log_probabilities_are_refused() -> None:
    holes = dictionaries([3, 9, 4, 5])
    holes[2] = None
    hollow = Flat([3, 9, 4, 5])
    hollow.end_indices[2] = hollow.start_indices[2]
    for found in (holes, hollow):
        with pytest.raises(ModelError, match="no log-probability for position 2"):
            from_prompt_logprobs(found, IDS, 0)
    for found in (None, [], holes[:3]):
        with pytest.raises(ModelError, match="not 5"):
            from_prompt_logprobs(found, IDS, 0)


def test_scores_of_given_ids_have_a_lower_bound_of_top1() -> None:
    found = np.log(np.array([[0.6], [0.4], [0.99]], np.float32))
    scores = from_token_id_logprobs(found, 3)
    np.testing.assert_array_equal(scores["logprob"], found[:, 0])
    assert set(scores) == {"logprob", "top1_bound"}
    assert scores["top1_bound"].tolist() == [True, False, True]
    for wrong in (None, found[:2], found.T):
        with pytest.raises(ModelError, match="shape"):
            from_token_id_logprobs(wrong, 3)


class StandInEngine:
    """LLMEngine's four methods, answering out of order, two requests a step, ln P = -(first id).

    For what the real one does only on a GPU (scores of given ids) or only by bad luck (a lost request).
    """

    def __init__(self, lose: bool = False) -> None:
        self.asked: list[tuple[str, list[int], Any]] = []
        self.most, self.aborted, self.lose = 0, [], lose

    def has_unfinished_requests(self) -> bool:
        return bool(self.asked) and not self.lose

    def add_request(
        self, name: str, prompt: dict[str, list[int]], params: Any, lora_request: Any = None
    ) -> None:
        self.asked.append((name, prompt["prompt_token_ids"], params))
        self.most = max(self.most, len(self.asked))

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        out = []
        for name, ids, params in [self.asked.pop() for _ in range(min(2, len(self.asked)))]:
            logprobs = [
                None,
                *({token: SimpleNamespace(logprob=-float(ids[0]), rank=1)} for token in ids[1:]),
            ]
            scores = None
            if hasattr(params, "prompt_logprob_token_ids"):
                wanted = [[token] for token in ids[params.prompt_logprob_start + 1 :]]
                assert params.prompt_logprob_token_ids == wanted
                scores = np.full((len(wanted), 1), -float(ids[0]), np.float32)
            answer = {"prompt_logprobs": logprobs, "prompt_token_id_logprobs": scores}
            out.append(SimpleNamespace(request_id=name, finished=True, **answer))
        return out


def sampling_parameters(
    prompt_logprobs: int = 0,
    prompt_logprob_token_ids: Any = None,
    prompt_logprob_start: int = 0,
    **others: Any,
) -> Any:
    """vllm.SamplingParams of a version that can score given ids from a given position on."""
    asked: dict[str, Any] = {"prompt_logprobs": prompt_logprobs}
    if prompt_logprob_token_ids is not None:
        asked |= {"prompt_logprob_token_ids": prompt_logprob_token_ids}
        asked |= {"prompt_logprob_start": prompt_logprob_start}
    return SimpleNamespace(**asked, **others)


def stand_in(monkeypatch: pytest.MonkeyPatch, engine: StandInEngine, by_id: bool = False) -> LoadedModel:
    """A model that was loaded into the engine; `by_id` skips the head before the first target."""
    scored = 3 if by_id else 4
    return described(monkeypatch, engine, LoadRequest(Path("model"), 5, 4, {}, n_windows=1, n_targets=scored))


def described(
    monkeypatch: pytest.MonkeyPatch, engine: StandInEngine, request: LoadRequest, v2: bool = True
) -> LoadedModel:
    """What loading makes of the engine."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=sampling_parameters))
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            logprobs_mode="raw_logprobs", dtype="torch.float32", get_vocab_size=lambda: 1000
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        cache_config=SimpleNamespace(num_gpu_blocks=None, block_size=16),
        use_v2_model_runner=v2,
    )
    engine.vllm_config = config
    llm = SimpleNamespace(llm_engine=engine, collective_rpc=lambda method: [])
    return vllm._described(llm, request, CPU, [], SimpleNamespace(stop=lambda: None))


@pytest.mark.parametrize("by_id", [False, True])
def test_windows_come_back_in_order_with_a_bounded_number_in_flight(
    monkeypatch: pytest.MonkeyPatch, by_id: bool
) -> None:
    engine = StandInEngine()
    model = stand_in(monkeypatch, engine, by_id)
    windows = [np.array([[2 * i, 5, 6, 7], [2 * i + 1, 5, 6, 7]]) for i in range(100)]
    columns = given_columns(VLLM, model, ("logprob", "top1"))
    assert columns == (("logprob", "top1_bound") if by_id else ("logprob", "top1"))
    results = list(score_batches(VLLM, model, [Batch(ids_BT, 2, columns) for ids_BT in windows]))
    assert [int(-x) for scores in results for x in scores["logprob"][:, 0]] == list(range(200))
    assert all(array.shape == (2, 2) for scores in results for array in scores.values())
    if not by_id:
        assert all(scores["top1"].all() for scores in results)
    else:
        assert [scores["top1_bound"].all() for scores in results] == [False] * 100
        assert results[0]["top1_bound"].tolist() == [[True, True], [False, False]]
    assert vllm.IN_FLIGHT <= engine.most <= vllm.IN_FLIGHT + 1 and engine.aborted == []
    assert model.notes == []


@pytest.mark.parametrize(
    ("n_windows", "n_targets", "v2", "by_id"),
    [
        (10, 10 * 511, True, False),  # every token is scored
        (10, 511 + 9 * 450, True, False),
        (10, 511 + 9 * 256, True, True),  # half of each window is context
        (10, 511 + 9 * 256, False, False),  # this version cannot
    ],
)
def test_the_head_is_skipped_only_where_that_saves_something(
    monkeypatch: pytest.MonkeyPatch, n_windows: int, n_targets: int, v2: bool, by_id: bool
) -> None:
    engine = StandInEngine()
    asked = LoadRequest(Path("model"), 512, 511, {}, n_windows=n_windows, n_targets=n_targets)
    model = described(monkeypatch, engine, asked, v2)
    assert model.columns == ("logprob", "top1_bound" if by_id else "top1")
    scores = score_one(VLLM, model, np.array([[3, 5, 6]]))
    assert scores.pop("logprob").tolist() == [[-3.0, -3.0]]
    assert {name: found.tolist() for name, found in scores.items()} == (
        {"top1_bound": [[False, False]]} if by_id else {"top1": [[True, True]]}
    )


@pytest.mark.parametrize(
    "v2",
    [True, False],
)
def test_an_engine_that_shows_no_logits_gives_what_it_has_and_says_why(
    monkeypatch: pytest.MonkeyPatch, v2: bool
) -> None:
    asked = LoadRequest(Path("model"), 5, 4, {}, n_targets=4, columns=("logprob", "top1", "argmax", "kld"))
    model = described(monkeypatch, StandInEngine(), asked, v2)
    assert model.columns == ("logprob", "top1") and model.reference_head is None
    (note,) = model.notes
    assert "this version of vLLM has no worker_extension_cls" in note
    assert set(score_one(VLLM, model, np.array([[3, 5, 6]]), wanted=asked.columns)) == {"logprob", "top1"}


def test_windows_left_are_taken_back_when_scoring_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StandInEngine()
    results = score_batches(VLLM, stand_in(monkeypatch, engine), [Batch(np.array([[1, 2]] * 5), 1)] * 2)
    next(results)
    results.close()
    assert len(engine.aborted) == len(engine.asked)

    lost = score_batches(VLLM, stand_in(monkeypatch, StandInEngine(lose=True)), [Batch(IDS[None], 1)])
    with pytest.raises(ModelError, match="dropped a window"):
        next(lost)


def request(window_tokens: int = 512, **options: Any) -> LoadRequest:
    return LoadRequest(Path("model"), window_tokens, window_tokens - 1, options)


def arguments(window_tokens: int = 512, hardware: Hardware = H200, **options: Any) -> dict[str, Any]:
    return engine_arguments(request(window_tokens, **options), hardware, 128_256, KNOWN, "0.32.0")


@pytest.mark.parametrize(
    ("hardware", "window_tokens", "step_tokens", "windows"),
    [
        (CPU, 512, 2048, 4),
        (CPU, 300, 1800, 6),
        (CPU, 8192, 2048, 1),
        (H200, 512, 8192, 16),
        (H200, 2048, 8192, 4),
        (H200, 3000, 6000, 2),
        (RTX, 2048, 2048, 1),
    ],
)
def test_a_step_holds_whole_windows_and_is_bounded(
    hardware: Hardware, window_tokens: int, step_tokens: int, windows: int
) -> None:
    made = arguments(window_tokens, hardware)
    assert made["max_num_batched_tokens"] == step_tokens
    assert made["max_num_seqs"] >= windows
    assert made["max_model_len"] == window_tokens + 1
    assert made["enable_prefix_caching"] is False and made["logprobs_mode"] == "raw_logprobs"


def test_options_go_to_the_engine() -> None:
    made = arguments(dtype="float16", tensor_parallel_size=2, gpu_memory_utilization=0.4, kv_cache_gib=3)
    assert (made["dtype"], made["tensor_parallel_size"], made["gpu_memory_utilization"]) == (
        "float16",
        2,
        0.4,
    )
    assert made["kv_cache_memory_bytes"] == 3 * 2**30
    assert "threads" not in arguments(threads=2) and "kv_cache_gib" not in made
    assert "gpu_memory_utilization" not in arguments(hardware=CPU)


def test_utilization_leaves_room_for_log_probabilities() -> None:
    assert arguments()["gpu_memory_utilization"] == 0.9
    for hardware, tokens in ((RTX, 2048), (H200, 8192)):
        share = arguments(hardware=hardware)["gpu_memory_utilization"]
        assert 0.5 < share <= 0.9
        assert (1 - share) * hardware.memory_bytes > tokens * 128_256 * 8


def test_utilization_leaves_room_for_the_head_of_a_reference() -> None:
    weight = StoredWeight(file="/x", offset=0, dtype="bfloat16", rows=256_000, columns=3584, sha256="0" * 64)
    head = ReferenceHead(kind="hidden", dtype="bfloat16", width=3584, vocab_size=256_000, weight=weight)
    beside = replace(request(2048), columns=("logprob", "kld"), reference=head)
    card = replace(RTX, memory_bytes=24 * 2**30)
    plain = engine_arguments(request(2048), card, 128_256, KNOWN, "0.32.0")["gpu_memory_utilization"]
    less = engine_arguments(beside, card, 128_256, KNOWN, "0.32.0")["gpu_memory_utilization"]
    assert (plain - less) * card.memory_bytes > 256_000 * 3584 * 2
    assert (1 - less) * card.memory_bytes > 2048 * 128_256 * 8 + 256_000 * 3584 * 2 + 2**28


def test_out_of_memory_halves_a_step() -> None:
    halved = engine_arguments(replace(request(2048), divide_work=2), H200, 128_256, KNOWN, "0.32.0")
    assert (halved["max_num_batched_tokens"], halved["max_num_seqs"]) == (4096, 4)


@pytest.mark.parametrize(
    ("options", "category", "words"),
    [
        ({"swap_space": 4}, "bad_option", "vLLM 0.32.0 has no option swap_space"),
        ({"max_model_len": 512}, "window_too_long", "512 tokens and max_model_len is 512"),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            "bad_option",
            "is 4, this machine has 2 GPUs",
        ),
    ],
)
def test_options_that_cannot_work_are_one_line(options: dict[str, Any], category: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        arguments(**options)
    assert caught.value.category == category and caught.value.remedy
    if "tensor_parallel_size" in options:
        arguments(**options, distributed_executor_backend="ray")


def test_cpu_kv_cache_follows_the_model() -> None:
    llama = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    assert cpu_kv_gib(llama, 2049) == 1  # 256 KiB a token in float32: 0.75 GiB with half as much again
    assert cpu_kv_gib({"text_config": llama}, 8193) == 4
    assert cpu_kv_gib({}, 2049) == 1


WRAPPED = """1 validation error for ModelConfig
  Value error, Model architectures ['FooForCausalLM'] are not supported for now. [type=value_error, ...]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error"""
KERNELS = "Failed to find a kernel that can implement the WNA16 linear layer. Reasons: \n A cannot\n B cannot"
ABOVE = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
LOG = """(EngineCore pid=1) ERROR 11-21 [core.py:1] Traceback (most recent call last):
(EngineCore pid=1) ERROR [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB.
RuntimeError: StartedEngine core initialization failed. See root cause above."""


@pytest.mark.parametrize(
    ("error", "log", "category", "message"),
    [
        (ValueError(WRAPPED), "", "unsupported_format", "Model architectures ['FooForCausalLM'] are not"),
        (ValueError(KERNELS), "", "unsupported_format", "Reasons: A cannot; B cannot"),
        (ValueError("Forced NVFP4 kernel X is not supported: Y"), "", "unsupported_format", "NVFP4 kernel X"),
        (ValueError("No available memory for the cache blocks. Try"), "", "no_kv_memory", "No available"),
        (RuntimeError(ABOVE), LOG, "oom_load", "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        (RuntimeError(ABOVE), "", "engine_error", "Engine core initialization failed"),
    ],
)
def test_start_errors_are_sorted(error: Exception, log: str, category: str, message: str) -> None:
    found = start_error(error, log)
    assert found.category == category
    assert message in found.message and "\n" not in found.message and "[type=" not in found.message


def test_remedy_of_a_format_names_what_runs_it() -> None:
    remedy = start_error(ValueError("Forced NVFP4 kernel X is not supported: Y"), "").remedy
    assert remedy is not None and "NVIDIA" in remedy


def test_warnings_about_accuracy_are_kept_though_vllm_configures_its_loggers() -> None:
    notes: list[str] = []
    warnings = AccuracyWarnings(notes)
    try:
        config = {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"handlers": []}}}
        logging.config.dictConfig(config)
        log = logging.getLogger("vllm.model_executor.layers.linear")
        for _ in range(2):
            log.warning("Weight-only %s compression will\nbe used", "FP4")
        log.warning("libtcmalloc is not found in LD_PRELOAD")
        logging.getLogger("vllm").setLevel(logging.INFO)
        log.info("fp8 may cause accuracy drop without a proper scaling factor")
        log.info("precision: bfloat16")
        logging.getLogger("other").warning("accuracy")
    finally:
        warnings.stop()
    log.warning("accuracy, too late")
    assert notes == [
        "vLLM: Weight-only FP4 compression will be used",
        "vLLM: fp8 may cause accuracy drop without a proper scaling factor",
    ]


def test_weight_only_numerics_are_noted() -> None:
    fp4 = {"num_bits": 4, "type": "float"}
    w4a4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": fp4}}}
    w4a16 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": None}}}
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    blackwell = Hardware(False, 1, 180 * 2**30, "NVIDIA B200", (10, 0))
    a100 = Hardware(False, 1, 40 * 2**30, "NVIDIA A100", (8, 0))
    for asked in (w4a4, modelopt):
        (note,) = numerics_notes(asked, H200, "auto")
        assert "4-bit" in note and "NVIDIA H200" in note and "weights alone" in note
        assert numerics_notes(asked, blackwell, "auto") == numerics_notes(asked, H200, "emulation") == []
    assert numerics_notes(w4a16, H200, "auto") == numerics_notes({}, H200, "auto") == []
    assert numerics_notes({"quant_method": "fp8"}, H200, "auto") == []
    assert len(numerics_notes({"quant_method": "fp8"}, a100, "auto")) == 1


def test_windows_longer_than_the_positions_fail_before_the_engine_starts(tiny: Path) -> None:
    (tiny / "config.json").write_text('{"max_position_embeddings": 100}')
    with pytest.raises(ModelError, match="101 tokens, the model has 100 positions") as caught:
        VLLM.load(LoadRequest(tiny, 101, 100, {}))
    assert caught.value.category == "window_too_long"
    with pytest.raises(ModelError, match='use load_fn "gguf"'):
        VLLM.load(LoadRequest(tiny / "model.safetensors", 10, 9, {}))
    with pytest.raises(ModelError, match="EXL3"):
        VLLM.load(LoadRequest(tiny, 10, 9, {}, overlay=tiny))


class SilentEngine:
    """A vllm.LLM of a version whose workers do not say what they used."""

    llm_engine = SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=None, block_size=16))
    )

    def collective_rpc(self, method: Any) -> list[Any]:
        runner = SimpleNamespace(model_memory_usage=0)
        return [method(SimpleNamespace(model_runner=runner, available_kv_cache_memory_bytes=3 * 2**30))]


def test_memory_that_workers_do_not_report_is_read_from_the_log() -> None:
    log = (ROOT / "tests" / "vllm_memory" / "logs" / "real-0.26-h200-bf16.log").read_text()
    found = used_memory(SilentEngine(), log)
    assert (found["weights_gib"], found["peak_activation_gib"], found["non_torch_gib"]) == (0.36, 0.24, 0.22)
    assert found["kv_cache_tokens"] == 2_414_128
    assert found["kv_cache_gib"] == 3.0  # what a worker says goes first
    assert "weights_gib" not in used_memory(SilentEngine(), "")


@pytest.fixture
def real(runs: Runs, smollm2: Any) -> VllmRuns:
    return VllmRuns(runs, smollm2)


def agree(real: VllmRuns, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """PPL within 0.2%, and token by token: a shift by one position would change every single one."""
    assert ours["status"] == theirs["status"] == "ok", (ours["error"], theirs["error"])
    assert ours["tokens_scored"] == theirs["tokens_scored"] == 8 * 255
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0.002)
    assert np.median(np.abs(real.logprob(ours) - real.logprob(theirs))) < 0.05
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.015)


@engine
def test_bf16_killed_while_scoring_continues_and_agrees_with_transformers(real: VllmRuns) -> None:
    step = {"max_num_batched_tokens": 256}  # one window per step, so that it can be killed between two
    models = real.runs.models(real.model("vllm", "bf16", **step))
    process = real.runs.process("-d", str(real.data), "-m", str(models))
    parts = real.runs.folder / "store" / "results"
    wait_for(lambda: list(parts.glob("*/parts/*.safetensors")), process)
    (worker,) = psutil.Process(process.pid).children()
    worker.send_signal(signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "host_oom_or_killed" in out + errors
    assert [pid for pid in psutil.pids() if session_of(pid) == worker.pid] == []
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("*/parts/*.safetensors")}
    assert 1 <= len(kept) < 8

    reference = real.runs.models(real.model("hf", "bf16", dtype="float32"), name="reference.json")
    code, (ours, theirs) = real.runs.compare(real.data, models, reference)
    assert code == 0
    agree(real, ours, theirs)
    assert ours["engine_version"].startswith("vllm")
    assert (ours["execution"]["device"][:3], ours["execution"]["dtype"]) == ("cpu", "bfloat16")
    assert ours["execution"]["memory"]["kv_cache_tokens"] >= 257
    assert ours["execution"]["versions"]["max_num_batched_tokens"] == "256"
    assert ours["identity"]["options"] == {}


@engine
def test_int4_agrees_with_transformers_and_nvfp4_says_what_would_run_it(real: VllmRuns) -> None:
    models = real.runs.models(
        real.model("vllm", "nvfp4"),
        real.model("vllm", "int4"),
        real.model("hf", "int4", dtype="float32"),
    )
    code, (failed, ours, theirs) = real.runs.compare(real.data, models)
    assert code == 1
    assert failed["error"]["category"] == "unsupported_format"
    assert "NVFP4" in failed["error"]["message"] and "NVIDIA" in failed["error"]["remedy"]
    agree(real, ours, theirs)
    assert ours["layer_bpw"] == pytest.approx(4.25, abs=0.01)


@engine
def test_fp8_and_int8_run_on_a_cpu(real: VllmRuns) -> None:
    """Their activations are quantized by kernels, and simulated by transformers: near, not equal."""
    w8a8 = real.runs.folder / "w8a8"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from quantize import Recipe, quantize_checkpoint\n"
        "quantize_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), Recipe('W8A8'))"
    )
    demo = str(ROOT / "demo")
    subprocess.run([sys.executable, "-c", script, demo, real.smollm2("bf16"), w8a8], check=True)
    int8 = {"model_dir": str(w8a8), "label": "INT8"}
    models = real.runs.models(
        real.model("vllm", "fp8"),
        real.model("hf", "fp8", dtype="float32"),
        real.model("vllm", "int8") | int8,
        real.model("hf", "int8", dtype="float32") | int8 | {"label": "INT8 hf"},
    )
    code, records = real.runs.compare(real.data, models)
    assert code == 0, [record["error"] for record in records]
    for ours, theirs in (records[:2], records[2:]):
        assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0.02)
        assert np.median(np.abs(real.logprob(ours) - real.logprob(theirs))) < 0.2
    assert "INT8" in records[2]["format"]


@engine
def test_gptq_and_awq_are_the_same_codes_in_other_layouts(real: VllmRuns) -> None:
    models = []
    for kind, name in (("gptq", "int4"), ("awq", "int4-asym")):
        target = real.runs.folder / kind
        command = [sys.executable, "-W", "ignore", ROOT / "tests" / "support" / "other_int4.py", kind]
        subprocess.run([*command, real.smollm2(name), target], check=True)
        models += [
            real.model("vllm", name) | {"model_dir": str(target), "label": kind},
            real.model("hf", name),
        ]
    code, records = real.runs.compare(real.data, real.runs.models(*models))
    assert code == 0, [record["error"] for record in records]
    for ours, theirs in (records[:2], records[2:]):
        assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0.005)
        assert np.median(np.abs(real.logprob(ours) - real.logprob(theirs))) < 0.1
    assert records[0]["format"].startswith("GPTQ INT4") and records[2]["format"].startswith("AWQ INT4")


@engine
def test_an_adapter_gives_what_merging_it_gives(real: VllmRuns) -> None:
    adapter = write_peft(real.runs.folder / "adapter", real.smollm2("bf16"))
    lora = {"lora": {"path": str(adapter), "name": "tuned"}}
    dense = merged(real.smollm2("bf16"), adapter, real.runs.folder / "merged")
    int4 = merged(real.smollm2("int4"), adapter, real.runs.folder / "merged-int4")
    models = real.runs.models(
        real.model("vllm", "bf16", dtype="float32") | lora,
        real.model("hf", "bf16", dtype="float32") | {"model_dir": str(dense), "label": "merged"},
        real.model("vllm", "int4") | lora,
        real.model("hf", "bf16", dtype="float32") | {"model_dir": str(int4), "label": "merged INT4"},
    )
    code, records = real.runs.compare(real.data, models)
    assert code == 0, [record["error"] for record in records]
    agree(real, *records[:2])
    # vLLM's INT4 kernel for CPUs computes in bfloat16 only.
    assert records[2]["ppl"] == pytest.approx(records[3]["ppl"], rel=0.005)
    assert np.median(np.abs(real.logprob(records[2]) - real.logprob(records[3]))) < 0.05
    assert records[0]["label"] == "vllm bf16 + tuned" and records[0]["lora"] == "tuned"


@engine
def test_an_adapter_of_too_high_rank_or_for_another_model_is_refused(real: VllmRuns) -> None:
    high = write_peft(real.runs.folder / "high", real.smollm2("bf16"), rank=520)
    model = real.model("vllm", "bf16")
    models = real.runs.models(model | {"lora": {"path": str(high)}})
    code, (record,) = real.runs.compare(real.data, models)
    assert code == 1 and record["error"]["category"] == "bad_adapter"
    assert "rank 520" in record["error"]["message"] and "512" in record["error"]["message"]


def wait_for(condition: Any, process: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "waited in vain"
        time.sleep(0.05)


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
