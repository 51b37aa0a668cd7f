"""KL divergence: the same numbers as its peers, and what it costs.

A case runs evalq once: the reference and the models beside it go into one store, on which the cost is then
measured by `divergence_side.py`, in one process with both kinds of passes taking turns.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import Bench, Case, Figure, within
from running import gguf_model, hf_model, peer, run, write_specs

BOUND_SIZES = (32, 128, 512, 4096)


def _compared(
    bench: Bench, models: list[dict[str, Any]], use: Callable[[list[Any], Path], list[Figure]], **data: object
) -> list[Figure]:
    """`use` of the records and the folder of `evalq compare --kld`, which is then removed."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    try:
        data_file, model_file = write_specs(bench, folder, data, models)
        out = folder / "records.json"
        argv: list[object] = [sys.executable, "compare.py", "-d", data_file, "-m", model_file, "--kld"]
        argv += ["--json", out, "-q", "--offline", "--store", folder / "store"]
        run(bench, argv)
        records = json.loads(out.read_text(encoding="utf-8"))
        for record in records[1:]:
            metrics = {name: found["value"] for name, found in record["against_reference"]["metrics"].items()}
            bench.raw.append({"command": "compare.py --kld", "model": record["label"], "metrics": metrics})
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


def _cost(what: str, models: Callable[[Bench], list[dict[str, Any]]], limit: float, **data: object) -> Case:
    """Seconds of scoring with KL divergence over seconds without."""

    def measure(bench: Bench) -> list[Figure]:
        def use(records: list[Any], folder: Path) -> list[Figure]:
            model, out = models(bench)[1], folder / "cost.json"
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


CASES: dict[str, Case] = {
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
