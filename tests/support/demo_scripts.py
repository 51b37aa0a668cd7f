"""The scripts of demo/, imported by path: they are no package, and one is named like a package on PyPI."""

import importlib.util
import os
import sys
from pathlib import Path

# As build.py does: without it, importing compressed-tensors imports torch's compiler and its warnings.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

DEMO = Path(__file__).parents[2] / "demo"
sys.path.append(str(DEMO))

import from_gguf  # noqa: E402, F401
import quantize  # noqa: E402, F401

_spec = importlib.util.spec_from_file_location("demo_build", DEMO / "build.py")
build = importlib.util.module_from_spec(_spec)
sys.modules["demo_build"] = build
_spec.loader.exec_module(build)
