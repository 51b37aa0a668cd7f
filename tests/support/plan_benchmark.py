"""benchmarks/memory_plan.py, imported by path: the measured rows and the model shapes."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[2] / "benchmarks" / "memory_plan.py"
_spec = importlib.util.spec_from_file_location("benchmark_memory_plan", _PATH)
measured = importlib.util.module_from_spec(_spec)
sys.modules["benchmark_memory_plan"] = measured
_spec.loader.exec_module(measured)
