"""The framework knows no engine: it reaches this room from inside functions only."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

ROOM = "evalq.vllm_memory"


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """Modules that are imported when a module is, those for type checkers left out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from imported([*node.body, *(line for one in node.handlers for line in one.body)])


def modules(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, list(imported(ast.parse(path.read_text()).body))


def test_no_other_room_imports_it() -> None:
    found = {path: names for path, names in modules(ROOT / "evalq") if path.parent.name != "vllm_memory"}
    assert len(found) > 50
    assert not [path for path, names in found.items() if any(name.startswith(ROOM) for name in names)]


def test_it_imports_no_engine_and_no_run() -> None:
    found = dict(modules(ROOT / "evalq" / "vllm_memory"))
    assert any(name.startswith("evalq.checkpoint") for names in found.values() for name in names)
    outside = ("evalq.backends", "evalq.plots", "evalq.run", "evalq.cli", "vllm", "torch")
    for path, names in found.items():
        assert not [n for n in names if n.startswith(tuple(f"{one}." for one in outside))], path
