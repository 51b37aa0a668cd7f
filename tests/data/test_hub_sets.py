"""Data sets of the hub, through the real `datasets`: from a hub on this machine, and from folders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from local_hub import SHA, LocalHub

from evalq.data.hub_sets import fetch
from evalq.data.rows import rows_from_file
from evalq.data.sources import load_text
from evalq.errors import DataError
from evalq.spec import DataSpec
from evalq.spec.texts import HubSet

pytest.importorskip("datasets")

# load_text() for each data spec; huggingface_hub reads HF_ENDPOINT once, so this is a process of its own.
CHILD = """
import json, sys
from pathlib import Path
from evalq.data.sources import load_text
from evalq.errors import DataError
from evalq.spec import DataSpec

found = []
for spec in json.loads(sys.argv[1]):
    try:
        text = load_text(DataSpec(**spec), Path("texts"), offline=False)
        found.append({"documents": text.documents, "origin": dict(text.origin), "name": text.name})
    except DataError as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


def load_through(hub: str, folder: Path, *specs: dict[str, Any]) -> list[dict[str, Any]]:
    """What load_text() finds for each spec in a process that takes `hub` for the hub."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "EVALQ_WIKITEXT2")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(specs)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_data_sets_of_a_hub(tmp_path: Path) -> None:
    hub_folder = tmp_path / "hub"
    sets = hub_folder / "datasets"
    write_jsonl(sets / "me" / "notes" / "test.jsonl", [{"id": i, "body": f"row {i}"} for i in range(5)])
    sentences = [{"sentence": "no it was n't"}, {"sentence": "black <unk> monday"}]
    write_parquet(sets / "ptb-text-only/ptb_text_only/penn_treebank/test/0000.parquet", sentences)
    documents = [{"text": f"document {i}", "url": "u"} for i in range(1200)]
    c4 = sets / "allenai" / "c4" / "en" / "c4-validation.00000-of-00008.json.gz"
    write_jsonl(c4.with_suffix(""), documents)
    subprocess.run(["gzip", c4.with_suffix("")], check=True)

    hub_set = {"dataset": "hub", "name": "me/notes", "column": "body"}
    with LocalHub(hub_folder) as hub:
        notes, first, ptb, cut, *faults = load_through(
            hub.url,
            tmp_path,
            hub_set | {"separator": "|"},
            hub_set | {"rows": 2, "split": "test", "revision": "main", "separator": "|"},
            {"dataset": "ptb", "protocol": "gptq"},
            {"dataset": "c4", "protocol": "gptq"},
            {"dataset": "hub", "name": "me/notes"},
            hub_set | {"split": "validation"},
            hub_set | {"config": "german"},
            hub_set | {"revision": "v9"},
            {"dataset": "hub", "name": "me/none"},
            {"dataset": "hub", "name": "no slash"},
        )
    assert notes["documents"] == ["row 0|row 1|row 2|row 3|row 4"]
    assert notes["origin"] == {"hub": "me/notes", "split": "test", "column": "body", "commit": SHA}
    assert notes["name"] == "me/notes" and first["name"] == "me/notes test"
    assert first["documents"] == ["row 0|row 1"]
    assert first["origin"]["rows"] == 2 and first["origin"]["revision"] == "main"
    assert ptb["documents"] == ["no it was n't black <unk> monday"] and ptb["origin"]["commit"] == SHA
    assert cut["documents"] == [" ".join(f"document {i}" for i in range(1100))]
    for fault, said in zip(
        faults,
        (
            'me/notes row 1 has no column "text" (set "column" to one of: id, body)',
            "Bad split: validation. Available splits: ['test']",
            "'german' not found",
            'has no revision "v9"',
            "there is no public data set me/none",
            '"no slash" is no folder, and no name of a data set on the hub',
        ),
        strict=True,
    ):
        assert said in fault["error"] and "\n" not in fault["error"]

    again = load_text(DataSpec(**hub_set, separator="|"), tmp_path / "texts", offline=True)
    assert list(again.documents) == notes["documents"], "kept: no network the second time"
    assert again.origin == notes["origin"]


def test_wikitext2_of_a_hub_is_checked_and_kept(wikitext2: Path, tmp_path: Path) -> None:
    original = wikitext2.read_bytes().decode("utf-8")
    rows = [{"text": row} for row in rows_from_file(original)]
    name = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
    repo = tmp_path / "hub" / "datasets" / "Salesforce" / "wikitext"
    write_parquet(repo / name, rows)
    configs = [f"- config_name: wikitext-{kind}-raw-v1" for kind in (2, 103)]
    files = [
        "  data_files:\n  - split: test\n    path: " + f"wikitext-{kind}-raw-v1/test-*" for kind in (2, 103)
    ]
    listed = "\n".join(f"{config}\n{file}" for config, file in zip(configs, files, strict=True))
    (repo / "README.md").write_text(f"---\nconfigs:\n{listed}\n---\n", encoding="utf-8")
    write_parquet(repo / "wikitext-103-raw-v1" / "test-00000-of-00001.parquet", rows[:-1])
    with LocalHub(tmp_path / "hub") as hub:
        two, three = load_through(
            hub.url,
            tmp_path,
            {"dataset": "wiki2", "protocol": "llama.cpp"},
            {"dataset": "wikitext-103", "protocol": "llama.cpp"},
        )
        assert two["documents"] == [original.removesuffix("\n")]
        assert (tmp_path / "texts" / "wiki.test.raw").read_text(encoding="utf-8") == original
        assert (
            three["documents"][0].startswith(" \n = ") and three["origin"]["config"] == "wikitext-103-raw-v1"
        )
        (tmp_path / "texts" / "wiki.test.raw").unlink()
        write_parquet(repo / name, rows[:-1])
        (changed,) = load_through(hub.url, tmp_path, {"dataset": "wiki2"})
    assert "not the WikiText-2 raw test split: 4,357 rows" in changed["error"]


def test_a_folder_laid_out_like_a_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"body": "a"}, {"body": "b"}])
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"body": "c"}])
    found = fetch(HubSet(str(tmp_path / "set"), split="test", column="body"), tmp_path / "texts", True)
    assert found.column.texts() == ("c",) and found.commit is None
    assert not (tmp_path / "texts").exists(), "what lies on this machine is not kept again"
    spec = DataSpec(dataset="hub", name="set", split="train", column="body", protocol="gptq")
    assert load_text(spec, tmp_path / "texts", offline=True).documents == ("a\n\nb",)


def test_scripts_of_a_folder_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("open('ran', 'w')", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        fetch(HubSet(str(tmp_path / "set")), tmp_path / "texts", False)
    assert not (tmp_path / "ran").exists()


def test_offline_and_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not fetched from the hub yet.*run once with a network"):
        fetch(HubSet("allenai/c4"), tmp_path, offline=True)
    with pytest.raises(DataError, match="allenai/c4 cannot be read: .*run once with a network") as caught:
        fetch(HubSet("allenai/c4"), tmp_path, offline=False)  # HF_HUB_OFFLINE is set for all tests
    assert "\n" not in str(caught.value)


def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    asked = HubSet("me/notes")
    with pytest.raises(DataError):
        fetch(asked, tmp_path / "texts", offline=True)
    from evalq.data.hub_sets import _key

    for content in ("broken", "[]", '{"asked": {}, "values": ["a"]}'):
        (tmp_path / "texts" / f"hub-{_key(asked)}.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="was not fetched"):
            fetch(asked, tmp_path / "texts", offline=True)
