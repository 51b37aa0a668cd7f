"""evalq's exl3 backend beside exllamav3's own evaluation loop: agreement, speed, memory, bits per weight.

    python benchmarks/gpu/exl3_truth.py run --hf CHECKPOINT --wikitext wiki.test.raw --work DIR

Converts the checkpoint (its dimensions must be multiples of 128) at several rates, scores each through the
command line (resident and streamed) and through a loop as exllamav3's eval/ppl.py has it, on the same token
ids, and writes DIR/summary.json and DIR/records.json after every model. Needs a CUDA GPU and exllamav3.

The loop: one window at a time, all logits of it in float16, exllamav3's own log-probability kernel, a
synchronization and a release of cached memory per window
(https://github.com/turboderp-org/exllamav3/blob/master/eval/ppl.py). Speed and memory are measured for both
sides in processes of their own on the same GPU: one pass to warm up, then the median of three.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    EVAL_LEN,
    EVAL_STRIDE,
    WINDOWS,
    allocated_bytes,
    child,
    measured,
    start_compare,
    token_ids,
    versions,
    windows_WT,
    write_data_spec,
)

from evalq.engine.backend import Batch, LoadRequest
from evalq.machine import environment

HEAD_BITS, CALIBRATION_ROWS, TIMED_PASSES = 6, 32, 5
SWEEP: list[dict[str, Any]] = [
    {"cuda_graph": False},
    {"cuda_graph": False, "batch_windows": 4},
    {"batch_windows": 2},
    {"head_chunk_mib": 96},
]


def peer(model_dir: Path, ids: np.ndarray, out: Path) -> dict[str, Any]:
    """exllamav3's own loop."""
    import torch
    from exllamav3 import Config, Model
    from exllamav3.util.measures import compute_target_log_probs

    config = Config.from_directory(str(model_dir))
    config.override_dynamic_seq_len(EVAL_LEN)
    model = Model.from_config(config)
    model.load(device=torch.device("cuda:0"))
    layer_bpw, head_bpw, _ = model.get_storage_info()
    loaded = allocated_bytes()
    windows = torch.from_numpy(windows_WT(ids))

    def one_pass() -> np.ndarray:
        kept, total = [], 0.0
        for row in range(len(windows)):
            inputs = windows[row : row + 1]
            logits = model.forward(inputs, {"attn_mode": "flash_attn_nc"})[:, :-1]
            targets = inputs[:, 1:].to(logits.device)
            logprob = compute_target_log_probs(logits, targets, config.vocab_size)
            total += logprob.sum().item()
            kept.append(logprob)
            del logits, targets, logprob
            torch.cuda.empty_cache()
        return np.stack([logprob.cpu().numpy() for logprob in kept])

    with torch.inference_mode():
        result = measured(one_pass, windows.shape[0] * (EVAL_LEN - 1), loaded, TIMED_PASSES)
        np.save(out.with_suffix(".npy"), one_pass())
    return result | {"layer_bpw": layer_bpw, "head_bpw": head_bpw}


def ours(model_dir: Path, ids: np.ndarray, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The backend of evalq. Its CUDA graph is recorded in the first pass and kept, like engine caches."""
    from evalq.backends.exl3 import Exl3Backend

    backend = Exl3Backend()
    windows = windows_WT(ids)
    request = LoadRequest(
        model_dir, EVAL_LEN, EVAL_LEN - 1, options, n_windows=WINDOWS, n_targets=windows[:, 1:].size
    )
    model = backend.load(request)
    loaded, size = allocated_bytes(), model.batch_windows
    batches = [Batch(windows[i : i + size], 1) for i in range(0, len(windows), size)]

    def one_pass() -> np.ndarray:
        return np.concatenate([scores["logprob"] for scores in backend.score(model, batches)])

    result = measured(one_pass, windows.shape[0] * (EVAL_LEN - 1), loaded, TIMED_PASSES)
    np.save(out.with_suffix(".npy"), one_pass())
    return {"options": options, "batch_windows": size, "notes": model.notes} | result


def convert(hf: Path, work: Path, rates: list[float]) -> Iterator[Path]:
    """EXL3 checkpoints, all converted at the same time; each is handed out when it is ready."""
    running = []
    for rate in rates:
        out = work / f"exl3-{rate:.1f}"
        command = [sys.executable, "-m", "exllamav3.conversion.convert_model", "-i", str(hf), "-o", str(out)]
        command += ["-w", str(work / f"convert-{rate:.1f}"), "-b", f"{rate}", "-hb", f"{HEAD_BITS}"]
        command += ["-cr", f"{CALIBRATION_ROWS}"]
        done = (out / "config.json").is_file()
        log = (work / f"convert-{rate:.1f}.log").open("wb")
        running.append((out, None if done else subprocess.Popen(command, stdout=log, stderr=log, cwd=work)))
    # All of them first: a conversion beside it would slow down what is measured.
    codes = [0 if process is None else process.wait() for _, process in running]
    for (out, _), code in zip(running, codes, strict=True):
        if code != 0:
            raise SystemExit(f"the conversion to {out.name} failed; see its log in {work}")
        yield out


def scored(specs: list[dict[str, Any]], data: Path) -> list[dict[str, Any]]:
    """Records of the command line, one process for each spec, with a store each: none answers for another."""
    stems = [spec["label"].replace(" ", "-") for spec in specs]
    stores = [data.parent / f"store-{i}" for i in range(len(specs))]
    running = [
        start_compare([spec], stem, data, store)
        for spec, stem, store in zip(specs, stems, stores, strict=True)
    ]
    for _, process in running:
        process.wait()
    return [json.loads(out.read_text())[0] for out, _ in running]


def side(name: str, model_dir: Path, work: Path, options: dict[str, Any] | None = None) -> Any:
    """Run one side in a process of its own."""
    out = work / f"{model_dir.name}.{name}.{'' if not options else '-'.join(options)}.json".replace("..", ".")
    given = {"model": str(model_dir), "ids": str(work / "ids.npy"), "options": options or {}}
    return child(Path(__file__), name, out, given)


def compared(model_dir: Path, name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """One model: the row of the summary, and the records."""
    work: Path = arguments.work
    base: dict[str, Any] = {"load_fn": "exl3", "model_dir": str(model_dir), "label": name}
    specs = [base, base | {"label": f"{name} streamed", "options": {"streaming": True}}]
    if model_dir == arguments.hf:  # the same weights in another engine: how far engines alone are apart
        specs.append(base | {"label": "BF16 transformers", "load_fn": "hf"})
    records = scored(specs, write_data_spec(work, arguments.wikitext, arguments.hf))
    failed = [record["error"] for record in records if record["status"] != "ok"]
    if failed:
        return {"model": name, "failed": failed}, records
    np.save(work / "ids.npy", token_ids(work / "store-0"))
    own, streamed = records[:2]
    theirs = side("peer", model_dir, work)
    mine = [side("ours", model_dir, work)]
    for options in [{"streaming": True}, *(SWEEP if name == arguments.sweep else [])]:
        mine.append(side("ours", model_dir, work, options))
    both = [np.load(work / f"{model_dir.name}.{name}.npy").ravel() for name in ("ours", "peer")]
    row = {
        "model": name,
        "ppl": own["ppl"],
        "ppl_streamed": streamed["ppl"],
        "ppl_exllamav3": theirs["ppl"],
        "ppl_difference_percent": 100 * (own["ppl"] / theirs["ppl"] - 1),
        "streamed_difference_percent": 100 * (streamed["ppl"] / own["ppl"] - 1),
        "token_difference_nats": {
            "mean": float(np.mean(both[0] - both[1])),
            "largest": float(np.abs(both[0] - both[1]).max()),
        },
        "layer_bpw": [own["layer_bpw"], theirs["layer_bpw"]],
        "head_bpw": [own["head_bpw"], theirs["head_bpw"]],
        "speed_ratio": mine[0]["tokens_per_second"] / theirs["tokens_per_second"],
        # The graph is recorded in the first pass, and torch counts its memory only then.
        "peak_memory_ratio": mine[0]["first_pass_peak_above_weights_mib"] / theirs["peak_above_weights_mib"],
        "evalq": mine,
        "exllamav3": theirs,
    }
    return row, records


def run(arguments: argparse.Namespace) -> None:
    """Everything, with what is finished written after every model."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    models = list(convert(arguments.hf, arguments.work, arguments.bits))
    named = [(path, f"EXL3 {path.name.removeprefix('exl3-')}") for path in models]
    rows: list[Any] = []
    records: list[Any] = []
    for path, name in [*named, (arguments.hf, "EXL3 FP16")]:
        row, more = compared(path, name, arguments)
        rows, records = [*rows, row], [*records, *more]
        summary = {
            "versions": versions("exllamav3", "torch", "triton", "evalq"),
            "hardware": environment(),
            "protocol": {"name": "exllamav3", "eval_len": EVAL_LEN, "eval_stride": EVAL_STRIDE},
            "windows": WINDOWS,
            "conversion": {"head_bits": HEAD_BITS, "calibration_rows": CALIBRATION_ROWS},
            "seconds": time.perf_counter() - began,
            "models": rows,
        }
        (arguments.work / "summary.json").write_text(json.dumps(summary, indent=1))
        (arguments.work / "records.json").write_text(json.dumps(records, indent=1))
        shown = {k: v for k, v in row.items() if k not in ("evalq", "exllamav3")}
        print(json.dumps(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("run")
    whole.add_argument("--hf", type=Path, required=True)
    whole.add_argument("--wikitext", type=Path, required=True)
    whole.add_argument("--work", type=Path, required=True)
    whole.add_argument("--bits", type=float, nargs="+", default=[2.0, 4.0, 3.0, 5.0, 6.0])
    whole.add_argument("--sweep", default="EXL3 4.0", help="the model that other options are tried on")
    for command in ("ours", "peer"):
        part = commands.add_parser(command)
        for name in ("--model", "--ids", "--out"):
            part.add_argument(name, type=Path, required=True)
        part.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    if arguments.command == "run":
        for name in ("hf", "wikitext", "work"):
            setattr(arguments, name, getattr(arguments, name).resolve())
        return run(arguments)
    given = (arguments.model, np.load(arguments.ids), arguments.out)
    result = peer(*given) if arguments.command == "peer" else ours(*given, arguments.options)
    arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
