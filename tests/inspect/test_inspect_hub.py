"""Models on the hub: their headers alone, and one clear line where there are none."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import (
    compressed,
    llama,
    llama_config,
    packed_int4,
    small_config,
    write_file,
    write_model,
    write_shards,
)
from local_hub import SHA, LocalHub

from evalq.errors import ModelError
from evalq.inspect import open_model


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    (tmp_path / "hub" / "someone").mkdir(parents=True)
    with LocalHub(tmp_path / "hub") as running:
        yield running


def run(
    tmp_path: Path, url: str, *arguments: str, command: str = "inspect", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """A command in a process whose hub is the local one and whose cache is empty."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *(("-m", "evalq", command) if command else ()), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def same_but_name(one: str, other: str) -> bool:
    first, second = json.loads(one), json.loads(other)
    for found in (first, second):
        del found["model"], found["commit"]
    return first == second


def test_sharded_model_without_its_weights(tmp_path, hub):
    config = llama_config(quantization_config=compressed(4, "pack-quantized"))
    tensors = list(llama(config, packed_int4).items())
    local = write_shards(
        tmp_path / "hub" / "someone" / "llama", [dict(tensors[n::4]) for n in range(4)], config
    )
    found = run(tmp_path, hub.url, "someone/llama", "--json", "--per-tensor")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["commit"] == SHA
    assert (
        json.loads(found.stdout)["scheme"] == "compressed-tensors pack-quantized INT4, group 128, symmetric"
    )
    assert 0 < hub.bytes_sent < 2**20 < json.loads(found.stdout)["disk_bytes"]
    of_files = json.loads(run(tmp_path, hub.url, str(local), "--json", "--per-tensor").stdout)
    of_files["tensors"].sort(key=lambda tensor: tensor["name"])
    of_hub = json.loads(found.stdout)
    of_hub["tensors"].sort(key=lambda tensor: tensor["name"])
    for key in ("parameters", "layer_bpw", "head_bpw", "tensors", "findings", "engines"):
        assert of_hub[key] == of_files[key], key


def test_faults_show_from_the_hub_too(tmp_path, hub):
    config = llama_config(layers=2)
    write_model(tmp_path / "hub" / "someone" / "llama", llama(config), config | {"hidden_size": 2048})
    found = run(tmp_path, hub.url, "someone/llama")
    assert found.returncode == 1
    assert "error shape-mismatch: model.embed_tokens.weight is 128256 x 4096" in found.stdout


def test_gguf_by_range_requests(tmp_path, hub, smollm2_gguf):
    folder = tmp_path / "hub" / "someone" / "quants"
    folder.mkdir()
    shutil.copy(smollm2_gguf, folder / "Q4_1.gguf")
    found = run(tmp_path, hub.url, "someone/quants/Q4_1.gguf", "--json")
    assert found.returncode == 0, found.stderr
    assert same_but_name(found.stdout, run(tmp_path, hub.url, str(smollm2_gguf), "--json").stdout)
    assert hub.bytes_sent < smollm2_gguf.stat().st_size / 2
    several = run(tmp_path, hub.url, "someone/quants")
    assert several.returncode == 2
    assert several.stderr == (
        "evalq: someone/quants: holds 1 GGUF file on the hub "
        "(name one of them, such as someone/quants/Q4_1.gguf)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["someone/gone"], "someone/gone: no such file or directory, and no public model of this name"),
        (["someone/empty"], "someone/empty: no safetensors and no GGUF file in this repository"),
        (["someone/bare"], "someone/bare: no config.json in this repository"),
        (["someone/empty", "--revision", "v9"], 'someone/empty has no revision "v9"'),
        (["someone/empty/x.gguf"], "someone/empty/x.gguf: no such file or directory, and no public model"),
        (["someone/gone", "--offline"], "not downloaded from the hub, and the hub is out of reach"),
    ],
)
def test_what_is_not_there(tmp_path, hub, arguments, words):
    for name in ("empty", "bare"):
        (tmp_path / "hub" / "someone" / name).mkdir()
    (tmp_path / "hub" / "someone" / "empty" / "README.md").write_text("nothing")
    write_file(tmp_path / "hub" / "someone" / "bare" / "model.safetensors", {"a.weight": ("BF16", (4, 4))})
    found = run(tmp_path, hub.url, *arguments)
    assert found.returncode == 2
    assert words in found.stderr
    assert found.stderr.startswith("evalq: ")
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


REFUSES = "http://127.0.0.1:9"
OUT_OF_REACH = (
    "no such file or directory, not downloaded from the hub, and the hub is out of reach (correct the path, "
    "or ask again with a network)"
)


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("url", [REFUSES, "silent", "http://no-such-host.invalid", "nonsense"])
def test_hub_out_of_reach(tmp_path, silent, url, command):
    """One line, no line of a library about tries; 30 s bound what takes up to 4 s and once took minutes."""
    more = ("--gpu", "H100") if command == "plan" else ()
    url = silent if url == "silent" else url
    found = run(tmp_path, url, "someone/llama", *more, command=command, timeout=30)
    assert found.returncode == 2
    assert found.stderr == f"evalq: someone/llama: {OUT_OF_REACH}\n"


def test_what_is_downloaded_serves_where_the_hub_is_silent(tmp_path, hub, silent):
    """A comparison once waited for the hub for minutes before it took the files that were there."""
    write_model(tmp_path / "hub" / "someone" / "llama", llama(small_config()), small_config())
    fetch = "from huggingface_hub import snapshot_download; snapshot_download('someone/llama')"
    run(tmp_path, hub.url, "-c", fetch, command="")
    online = run(tmp_path, hub.url, "someone/llama", "--json")
    found = run(tmp_path, silent, "someone/llama", "--json", timeout=30)
    assert (found.returncode, found.stderr) == (0, "")
    assert same_but_name(found.stdout, online.stdout)


@pytest.mark.parametrize("name", ["a--b/c", "owner/name.", "~nobody/x", "owner/" + "x" * 300, "o/n\x1b[31m"])
def test_names_that_the_hub_does_not_allow(tmp_path, hub, name):
    found = run(tmp_path, hub.url, name)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "no such file or directory" in found.stderr
    assert "\x1b" not in found.stderr


def test_a_plan_of_a_hub_name_from_metadata_alone(tmp_path, hub):
    folder = write_model(tmp_path / "hub" / "someone" / "llama", llama(llama_config()), llama_config())
    of_hub = run(tmp_path, hub.url, "someone/llama", "--gpu", "H100", "--json", command="plan")
    assert of_hub.returncode == 0, of_hub.stderr
    assert hub.bytes_sent < 2**20
    of_files = run(tmp_path, hub.url, str(folder), "--gpu", "H100", "--json", command="plan")
    one, other = json.loads(of_hub.stdout), json.loads(of_files.stdout)
    assert one.pop("model") == "someone/llama"
    assert other.pop("model") == "llama"
    assert one == other


def test_name_that_is_no_path_and_no_hub_name():
    with pytest.raises(ModelError) as error:
        open_model("models/that/are/not/there")
    assert (
        str(error.value)
        == "models/that/are/not/there: no such file or directory, and no owner/name of the hub"
    )
