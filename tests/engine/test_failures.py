# ruff: noqa: E501
"""Engines' real messages are sorted into the right categories."""

import signal

import pytest

from evalq.engine.failures import CATEGORIES, classify, from_exception, from_exit, remedy_of
from evalq.errors import ModelError

MESSAGES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has", "load", "oom_load"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has", "forward", "oom_forward"),
    ("Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization", "load", "oom_load"),
    ("ValueError: No available memory for the cache blocks. Try increasing", "load", "no_kv_memory"),
    ("ValueError: To serve at least one request with the model's max seq len (16000), 2.0 GiB", "load", "max_len_too_large"),
    ("Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization", "load", "gpu_busy"),
    ("AssertionError: Cannot re-initialize the input batch when CPU weight offloading is enabled", "load", "offload_unsupported"),
    ("RuntimeError: No CUDA GPUs are available", "load", "no_gpu"),
    ("MemoryError: Unable to allocate 1.2 GiB for an array", "forward", "oom_forward"),
    ("RuntimeError: unable to mmap 4295458632756 bytes from file </m/model.safetensors>: Cannot allocate memory (12)", "load", "oom_load"),
    ("ModuleNotFoundError: No module named 'gptqmodel'", "load", "engine_missing"),
    ("SafetensorError: Error while deserializing header: HeaderTooLarge", "load", "model_corrupt"),
    ("KeyError: 'foo'", "forward", "engine_error"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "stage", "category"), MESSAGES)
def test_message(message: str, stage: str, category: str) -> None:
    assert classify(message, stage) == category


def test_root_cause_goes_before_its_wrapper() -> None:
    log = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "RuntimeError: Engine core initialization failed. See root cause above."
    )
    assert classify(log, "load") == "oom_load"


def test_exception_keeps_the_engines_first_line() -> None:
    found = from_exception(RuntimeError("\n first line \n second"), "load")
    assert found.message == "RuntimeError: first line" and found.category == "engine_error"
    mine = ModelError("as is", "bad_option")
    assert from_exception(mine, "load") is mine


@pytest.mark.parametrize(
    ("returncode", "category", "named"),
    [
        (-signal.SIGKILL, "host_oom_or_killed", "SIGKILL"),
        (-signal.SIGSEGV, "crashed", "SIGSEGV"),
        (3, "crashed", "code 3"),
    ],
)
def test_silent_end(returncode: int, category: str, named: str) -> None:
    found = from_exit(returncode, "forward", "last words\n\n")
    assert found.category == category and named in found.message


def test_silent_end_with_a_telling_log() -> None:
    assert (
        from_exit(-signal.SIGABRT, "load", "x\nCUDA out of memory. Tried to allocate\n").category
        == "oom_load"
    )


def test_a_killed_worker_is_not_explained_by_what_its_log_mentions() -> None:
    log = "WARNING symm_mem.py: symmetric memory multicast operations are not supported.\nINFO scoring\n"
    assert from_exit(-signal.SIGKILL, "forward", log).category == "host_oom_or_killed"
    assert from_exit(1, "forward", log).category == "crashed"
    told = from_exit(1, "load", f"{log}ValueError: No available memory for the cache blocks\nshutting down\n")
    assert told.category == "no_kv_memory" and told.message.startswith("ValueError: No available")


def test_every_category_says_what_to_do() -> None:
    for name, category in CATEGORIES.items():
        assert category.meaning and category.remedy, name
        assert remedy_of(ModelError("m", name)) == category.remedy
    assert remedy_of(ModelError("m", "crashed", "mine")) == "mine"
