"""Where results go: checked before anything is scored, whole, with the umask's mode."""

import json
import os
import stat
from pathlib import Path

import pytest
from conftest import Runs

from evalq.cli.main import compare_main


def nothing_was_scored(runs: Runs) -> bool:
    return not list((runs.folder / "store").glob("results/*"))


def test_missing_matplotlib_is_said_before_scoring(runs: Runs) -> None:
    (runs.folder / "without").mkdir()
    (runs.folder / "without" / "matplotlib.py").write_text("raise ModuleNotFoundError('No module named X')")
    environment = os.environ | {"PYTHONPATH": str(runs.folder / "without")}
    process = runs.process("-d", str(runs.data()), "-m", str(runs.models({})), "-p", env=environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and nothing_was_scored(runs)
    assert len(errors.strip().splitlines()) == 1 and 'pip install "evalq[plot]"' in errors


@pytest.mark.parametrize("flag", ["--csv", "--json", "--markdown", "-o"])
def test_a_folder_is_no_output(runs: Runs, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    Path("folder.png").mkdir()
    assert compare_main(["-d", str(runs.data()), "-m", str(runs.models({})), flag, "folder.png"]) == 2
    assert "is a folder" in capsys.readouterr().err and nothing_was_scored(runs)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "new/" + "y" * 300 + "/c.png"])
def test_a_name_too_long_is_found_at_once(runs: Runs, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert compare_main(["-d", str(runs.data()), "-m", str(runs.models({})), "-o", name]) == 2
    assert "name too long" in capsys.readouterr().err and nothing_was_scored(runs)


def test_files_have_the_mode_of_the_umask(runs: Runs) -> None:
    before = os.umask(0o027)
    try:
        more = ("--csv", "t.csv", "--markdown", "t.md", "-p", "-o", "c.png")
        assert runs.compare(runs.data(), runs.models({}, {"options": {"seed": 1}}), more=more)[0] == 0
    finally:
        os.umask(before)
    for name in ("t.csv", "t.md", "c.png", "records.json"):
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o640, name
    for file in (runs.folder / "store").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o750 if file.is_dir() else 0o640), file


def test_links_and_devices_stay_what_they_are(runs: Runs) -> None:
    Path("real.csv").write_text("old")
    Path("link.csv").symlink_to("real.csv")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    more = ("--csv", "link.csv", "--markdown", "pipe")
    assert runs.compare(runs.data(), runs.models({}), more=more)[0] == 0
    assert Path("link.csv").is_symlink() and Path("real.csv").read_text().startswith("label,")
    assert b"| model |" in os.read(reader, 65536) and stat.S_ISFIFO(os.stat("pipe").st_mode)
    os.close(reader)


def test_a_text_cut_for_lm_eval_ends_in_a_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.data(protocol="lm-eval", eval_stride=None, max_rows=None, max_tokens=600)
    code, records = runs.compare(data, runs.models({}, {"options": {"seed": 1}}), more=("--csv", "t.csv"))
    shown = capsys.readouterr()
    assert code == 0 and records[0]["ppl"] > 1 and records[0]["word_ppl"] is None
    assert "no perplexity per word" in shown.out and "without a perplexity per word" in shown.err
    assert records[0]["bits_per_byte"] > 0


def test_json_on_standard_output_is_json_alone(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    models = runs.models({"label": "C1 \x9b31m"})
    assert compare_main(["-d", str(runs.data()), "-m", str(models), "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)[0]["label"] == "C1 \x9b31m" and "\x9b" not in out


@pytest.mark.parametrize(
    "more", [("--timeout", "1e10"), ("--timeout", "nan"), ("--timeout", "0"), ("--max-rows", "0")]
)
def test_numbers_out_of_range_are_usage_errors(
    runs: Runs, capsys: pytest.CaptureFixture[str], more: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_main(["-d", str(runs.data()), "-m", str(runs.models({})), *more])
    assert ended.value.code == 2 and "should be" in capsys.readouterr().err


def test_a_chart_without_any_divergence_is_said_after_the_table(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    models = runs.models({"label": "One"}, {"label": "Two", "options": {"seed": 1}})
    assert compare_main(["-d", str(runs.data()), "-m", str(models), "-kld", "-o", "c.png"]) == 0
    shown = capsys.readouterr()
    assert "One" in shown.out and "no chart: no model has a KL divergence" in shown.err
    assert not Path("c.png").exists()
