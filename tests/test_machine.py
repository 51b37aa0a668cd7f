"""What nvidia-smi says, and what a record keeps of a machine."""

import os
from pathlib import Path

import pytest

from evalq import machine
from evalq.machine import GIB, Gpu, Machine, environment, parse_gpus, this_machine

ROWS = "NVIDIA H200, 143771, 570.86.15, 9.0\nNVIDIA A100, 81920, 570.86.15, 8.0\nbroken, row\n\n"
TABLE = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |"


def test_rows_of_nvidia_smi():
    assert parse_gpus(ROWS) == (
        Gpu("NVIDIA H200", 143771 * 2**20, "570.86.15", (9, 0)),
        Gpu("NVIDIA A100", 81920 * 2**20, "570.86.15", (8, 0)),
    )
    assert Machine(GIB, parse_gpus(ROWS)).memory_bytes == (143771 + 81920) * 2**20
    assert Machine(GIB, ()).memory_bytes == GIB


def test_a_gpu_that_shares_the_machines_memory():
    (gpu,) = parse_gpus("NVIDIA GB10, [N/A], 580.95.05, 12.1\n")
    assert (gpu.memory_bytes, gpu.capability) == (None, (12, 1))
    assert Machine(119 * GIB, (gpu,)).memory_bytes == 119 * GIB


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program of this name in front of the real one, whose answers a test writes."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        this_machine.cache_clear()
        environment.cache_clear()

    yield install
    machine.this_machine.cache_clear()
    machine.environment.cache_clear()


def test_environment_of_two_gpus(nvidia_smi):
    nvidia_smi(f"case \"$1\" in --query*) printf '{ROWS}';; *) echo '{TABLE}';; esac")
    found = environment()
    assert found["gpus"] == [
        {"name": "NVIDIA H200", "memory_gib": 140.4},
        {"name": "NVIDIA A100", "memory_gib": 80.0},
    ]
    assert (found["driver"], found["cuda"]) == ("570.86.15", "12.8")


def test_a_driver_that_does_not_know_the_compute_capability(nvidia_smi):
    nvidia_smi('case "$1" in *compute_cap*) exit 2;; esac; echo "Tesla V100, 16160, 470.1"')
    assert this_machine().gpus == (Gpu("Tesla V100", 16160 * 2**20, "470.1", None),)


@pytest.mark.parametrize("script", ["exit 9", "printf '\\377\\376'", "echo no devices were found", "true"])
def test_without_a_gpu(nvidia_smi, script):
    nvidia_smi(script)
    found = environment()
    assert (found["gpus"], found["driver"], found["cuda"]) == ([], None, None)
