"""KL divergence: the same numbers as its peers, and what it costs.

A case runs evalq once: the reference and the models beside it go into one store, on which the cost is then
measured by `divergence_side.py`, in one process with both kinds of passes taking turns.
"""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import Bench, Case, Figure, within
from running import gguf_model, hf_model, peer, run, write_specs

from evalq.results.estimate import Sample
from evalq.results.statistics import Clusters
from evalq.results.store import ResultDir

BOUND_SIZES = (32, 128, 512, 4096)


def _compared(
    bench: Bench,
    models: list[dict[str, Any]],
    use: Callable[[list[Any], Path], list[Figure]],
    flags: Sequence[str] = ("--kld",),
    **data: object,
) -> list[Figure]:
    """`use` of the records and the folder of `evalq compare` with these flags, which is then removed."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        data_file, model_file = write_specs(bench, folder, data, models)
        out = folder / "records.json"
        argv: list[object] = [sys.executable, "compare.py", "-d", data_file, "-m", model_file, *flags]
        argv += ["--json", out, "-q", "--offline", "--store", folder / "store"]
        run(bench, argv)
        records = json.loads(out.read_text(encoding="utf-8"))
        for record in records[1:]:
            metrics = {name: found["value"] for name, found in record["against_reference"]["metrics"].items()}
            bench.raw.append(
                {"command": " ".join(("compare.py", *flags)), "model": record["label"], "metrics": metrics}
            )
        return use(records, folder)
    finally:
        shutil.rmtree(folder)


def _row(what: str, mine: float, theirs: float, name: str, absolute: float, percent: float) -> Figure:
    """One figure beside the peer's; both parts of the limit count together."""
    apart = abs(mine - theirs)
    return Figure(
        what=what,
        evalq=f"{mine:.6f}",
        peer=f"{name}: {theirs:.6f}",
        value=f"{apart:.2e} apart",
        target=f"within {absolute:g} + {percent:g}%",
        met=apart <= absolute + percent / 100 * abs(theirs),
    )


def _values(record: dict[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in record["against_reference"]["metrics"].items()}


def _llama(bench: Bench) -> list[Figure]:
    """The second half of eight chunks of 512, F16 against two quantizations.

    llama-perplexity keeps the reference in 16 bits and leaves out what is below -16 nats; its KLD shows that.
    So evalq's is compared with float64 from the same logits too, and that says how large the tool's floor is.
    """
    quantizations = ("Q8_0", "Q4_1")

    def use(records: list[Any], folder: Path) -> list[Figure]:
        figures = []
        for name, record in zip(quantizations, records[1:], strict=True):
            files = ("--reference", bench.gguf("F16"), "--model", bench.gguf(name), "--chunks=8")
            theirs, plain = peer(bench, "llama_kld", *files), peer(bench, "llama_float64", *files)
            mine, what = _values(record), f"`gguf` {name} beside F16, n_ctx 512, 8 chunks"
            tool = "llama-perplexity"
            floor = abs(plain["kld_coded"] - plain["kld"])
            figures += [
                _row(f"{what}: KLD", mine["kld"], plain["kld"], "float64", 1e-6, 0.1),
                _row(f"{what}: KLD, 16-bit floor {floor:.1e}", mine["kld"], theirs["kld"], tool, floor, 0.1),
                _row(f"{what}: same top", mine["same_top"], theirs["same_top"], tool, 1e-5, 0),
                _row(f"{what}: delta p", mine["delta_p"], theirs["delta_p"], tool, 1e-5, 0),
                _row(f"{what}: RMS delta p", mine["delta_p_rms"], theirs["delta_p_rms"], tool, 1e-5, 0),
            ]
        return figures

    models = [gguf_model(bench, "F16") | {"reference": True}, *(gguf_model(bench, q) for q in quantizations)]
    return _compared(bench, models, use, protocol="llama.cpp", eval_len=512, max_rows=8, tokenize_fn="gguf")


def _int4(bench: Bench) -> dict[str, Any]:
    return hf_model(bench) | {"label": "INT4", "model_dir": str(bench.models / "int4")}


def _float64(bench: Bench) -> list[Figure]:
    """INT4 beside the checkpoint it was made from, both in float32."""

    def use(records: list[Any], folder: Path) -> list[Figure]:
        arguments = ("--reference", bench.hf_dir, "--model", bench.models / "int4", "--rows=3")
        theirs = peer(bench, "plain_kld", *arguments, "--top", *map(str, BOUND_SIZES))
        mine, what, name = _values(records[1]), "`hf` INT4, fp32, L 512", "plain loop, float64"
        figures = [
            _row(f"{what}: KLD", mine["kld"], theirs["kld"], name, 1e-6, 0.1),
            _row(f"{what}: same top", mine["same_top"], theirs["same_top"], name, 0, 0),
            _row(f"{what}: acceptance", mine["acceptance"], theirs["acceptance"], name, 1e-6, 0.1),
        ]
        for k in BOUND_SIZES:
            bound = theirs["top"][str(k)]
            figures.append(
                Figure(
                    what=f"{what}: lower bound from the reference's {k} most probable tokens and one bucket",
                    evalq=f"exact {mine['kld']:.6f}",
                    peer=f"bound: {bound:.6f}",
                    value=f"{(1 - bound / mine['kld']) * 100:.2f}% below",
                    target="not above the exact one",
                    met=bound <= mine["kld"] + 1e-6,
                )
            )
        return figures

    models = [hf_model(bench) | {"reference": True}, _int4(bench)]
    return _compared(bench, models, use, protocol="gptq", eval_len=512, max_rows=3)


def _cost(what: str, models: Callable[[Bench], list[dict[str, Any]]], limit: float, **data: Any) -> Case:
    """Seconds of scoring with KL divergence over seconds without."""

    def measure(bench: Bench) -> list[Figure]:
        def use(records: list[Any], folder: Path) -> list[Figure]:
            model, out = models(bench)[-1], folder / "cost.json"
            argv: list[object] = [sys.executable, "benchmarks/divergence_side.py"]
            argv += ["--load-fn", model["load_fn"], "--model", model["model_dir"]]
            argv += ["--options", json.dumps(model["options"]), "--data", folder / "data.json"]
            argv += ["--store", folder / "store", "--passes", bench.repetitions, "--out", out]
            run(bench, argv)
            found = json.loads(out.read_text(encoding="utf-8"))
            bench.raw.append({"command": "divergence_side.py", **found})
            speed = found["tokens_per_second"]
            kept = sum(f.stat().st_size for f in (folder / "store/references").glob("*/*")) / 2**20
            rows = [
                Figure(
                    what=f"{what}: scoring with KLD",
                    evalq=f"{speed['kld']:.0f} tok/s",
                    peer=f"without: {speed['plain']:.0f} tok/s",
                    value=f"{found['ratio']:.3f} times the time",
                    target=f"at most {limit}",
                    met=within(found["ratio"], limit, at_least=False),
                ),
                Figure(
                    what=f"{what}: kept of the reference",
                    evalq=f"{kept:.1f} MiB",
                    peer="",
                    value=f"{kept * 2**20 / found['tokens'] / 1000:.2f} kB a token",
                ),
            ]
            return rows

        return _compared(bench, models(bench), use, **data)

    return measure


def _overlap(bench: Bench) -> list[Figure]:
    """Errors of windows that overlap beside those of windows side by side, on the same text.

    Each text has 24 windows of 256 tokens. With a stride of 64 every token is scored four times
    (`exllamav3`), or once after 192 others (`hf-strided`); side by side once, after 0 to 255 others.
    """
    length, stride, n_windows = 256, 64, 24
    rows = {"gptq": n_windows, **dict.fromkeys(("exllamav3", "hf-strided"), 4 * (n_windows - 1) + 1)}
    errors: dict[str, tuple[float, float]] = {}
    for protocol, max_rows in rows.items():

        def use(records: list[Any], folder: Path, protocol: str = protocol) -> list[Figure]:
            base, other = (ResultDir(folder / "store/results" / r["key"]).scores() for r in records)
            assert base is not None and other is not None
            ratio = base.columns["logprob"].astype(np.float64) - other.columns["logprob"]
            by_window = Sample(ratio, Clusters.named(other.window_of)).mean_stderr
            found = records[1]["against_reference"]["metrics"]["ln_ratio"]["stderr"]
            errors[protocol] = found, by_window or 0.0
            return []

        models = [gguf_model(bench, "F16") | {"reference": True}, gguf_model(bench, "Q4_0")]
        data: dict[str, Any] = {"eval_len": length, "max_rows": max_rows, "tokenize_fn": "gguf"}
        data["eval_stride"] = length if protocol == "gptq" else stride
        _compared(bench, models, use, flags=(), protocol=protocol, **data)
    aside = errors["gptq"][0]
    # The error of n windows is itself known to 1 part in sqrt(2 (n - 1)): a ratio of two to 1 in sqrt(n - 1).
    known = 2 / math.sqrt(n_windows - 1)
    return [
        Figure(
            what=f"`gguf` Q4_0 beside F16, L {length}, S {stride}, `{protocol}`: error of ln PPL ratio",
            evalq=f"{errors[protocol][0]:.5f}",
            peer=f"side by side: {aside:.5f}; windows taken for independent: {errors[protocol][1]:.5f}",
            value=f"{errors[protocol][0] / aside:.2f} times",
            target=f"1 within {known:.2f}: what {n_windows} windows tell",
            met=abs(errors[protocol][0] / aside - 1) <= known,
        )
        for protocol in list(rows)[1:]
    ]


def _large(bench: Bench) -> Path:
    """The folder of the large model. Raises LookupError."""
    if bench.large is None:
        raise LookupError("no --large")
    return bench.large


def _large_hf(bench: Bench) -> dict[str, Any]:
    return hf_model(bench) | {"label": "HF 1.5B", "model_dir": str(_large(bench) / "bf16"), "reference": True}


def _large_gguf(bench: Bench) -> dict[str, Any]:
    options = {"threads": bench.threads}
    file = _large(bench) / "Q4_K_M.gguf"
    return {
        "load_fn": "gguf",
        "fwd_fn": "gguf",
        "label": "Q4_K_M",
        "model_dir": str(file),
        "options": options,
    }


CASES: dict[str, Case] = {
    "agree-overlap-errors": _overlap,
    "agree-kld-llama": _llama,
    "agree-kld-float64": _float64,
    "cost-kld-hf": _cost(
        "`hf` INT4 beside BF16, fp32, L 1024, 2 windows",
        lambda bench: [hf_model(bench) | {"reference": True}, _int4(bench)],
        1.35,
        protocol="gptq",
        eval_len=1024,
        max_rows=2,
    ),
    "cost-kld-gguf": _cost(
        "`gguf` Q8_0 beside F16, n_ctx 512, 4 windows",
        lambda bench: [gguf_model(bench, "F16") | {"reference": True}, gguf_model(bench, "Q8_0")],
        1.5,
        protocol="gptq",
        eval_len=512,
        max_rows=4,
        tokenize_fn="gguf",
    ),
}

# Of a model of 1.5 billion weights, d 1536 and V 151,936: `--large` names it.
LARGE_CASES: dict[str, Case] = {
    "cost-kld-hf-large": _cost(
        "`hf` Qwen2.5-Coder-1.5B beside itself, fp32, L 512, 1 window",
        lambda bench: [_large_hf(bench)],
        1.35,
        protocol="gptq",
        eval_len=512,
        max_rows=1,
    ),
    "cost-kld-gguf-large": _cost(
        "`gguf` Qwen2.5-Coder-1.5B Q4_K_M beside `hf`, L 512, 2 windows",
        lambda bench: [_large_hf(bench), _large_gguf(bench)],
        1.5,
        protocol="gptq",
        eval_len=512,
        max_rows=2,
    ),
    "cost-kld-gguf-logits-large": _cost(
        "`gguf` Qwen2.5-Coder-1.5B Q4_K_M beside itself (16-bit logits kept), L 512, 1 window",
        lambda bench: [_large_gguf(bench) | {"reference": True}],
        1.5,
        protocol="gptq",
        eval_len=512,
        max_rows=1,
        tokenize_fn="gguf",
    ),
}
