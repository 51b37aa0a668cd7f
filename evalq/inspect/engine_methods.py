"""Which quantization methods an installed engine lists itself, read from its files without importing it.

vLLM: `QuantizationMethods` (before 0.7 `QUANTIZATION_METHODS`) of `vllm/model_executor/layers/quantization`;
transformers: `AUTO_QUANTIZER_MAPPING` of `transformers/quantizers/auto.py`. The names are those that a
checkpoint's `quant_method` holds. Releases drop and add methods: vLLM 0.26 reads bitsandbytes, 0.32 does not.
"""

import ast
from functools import cache
from pathlib import Path

from evalq.engine.interpreters import ask

# Engine -> its file below a folder of packages, and the variables there whose strings are methods.
_TABLES = {
    "vllm": (
        "vllm/model_executor/layers/quantization/__init__.py",
        ("QuantizationMethods", "QUANTIZATION_METHODS"),
    ),
    "hf": ("transformers/quantizers/auto.py", ("AUTO_QUANTIZER_MAPPING",)),
}
_BYTES_MAX = 2**20


def listed_methods(engine: str, python: str | None) -> frozenset[str] | None:
    """The methods that the installed engine lists; None where that cannot be told.

    Args:
        engine: canonical backend name.
        python: the engine's interpreter, None for this one.

    Raises:
        ModelError: category engine_missing, when that interpreter cannot be run.
    """
    if engine not in _TABLES:
        return None
    below, variables = _TABLES[engine]
    files = (Path(folder) / below for folder in ask(python).folders)
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else _strings(found, variables)


def lists(methods: frozenset[str], method: str) -> bool:
    """Whether a method is among those listed, under its own name or that of a variant (gptq_marlin)."""
    return any(method == one or one.startswith(f"{method}_") or one.endswith(f"_{method}") for one in methods)


@cache
def _strings(file: Path, variables: tuple[str, ...]) -> frozenset[str] | None:
    """Strings in what a module assigns to these variables; None for another kind of module."""
    try:
        if file.stat().st_size > _BYTES_MAX:
            return None
        module = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    found: set[str] = set()
    for statement in module.body:
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", 0)]
        )
        named = any(isinstance(target, ast.Name) and target.id in variables for target in targets)
        value = getattr(statement, "value", None)
        if named and isinstance(value, ast.AST):
            nodes = ast.walk(value)
            found |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(found) or None
