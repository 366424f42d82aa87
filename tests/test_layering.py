"""Layering: imports point down only, and nothing but the table knows the methods' names."""

import ast
import re
import sys
from pathlib import Path

import pytest

import asyncprop
import asyncprop.engine

HOUSE = Path(asyncprop.__file__).parent
# From the bottom up; a part may import parts below it, and itself.
ORDER = ["trace", "theory", "recorder", "clock", "devices", "delay", "engine", "replay", "exchange", "config",
         "testing", "tasks", "runs", "checkpoint", "report", "methods", "simulate", "bench", "exhibits", "interrupt",
         "dashboard", "progress", "loggers", "listing", "launch", "rank", "cli", "__main__"]  # fmt: skip
FILES = sorted(path for path in HOUSE.rglob("*.py") if path != HOUSE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Parts of asyncprop that a file imports, wherever in it; for type checkers only counts, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "asyncprop" else [f"asyncprop.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("asyncprop.")}
    homes = {name: home.split(".")[1] for name, home in asyncprop._HOME.items()}  # of names that asyncprop itself has
    return {homes.get(name, name) for name in found} - {"__version__"}


def modules_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return froms | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_point_down(path: Path) -> None:
    place = ORDER.index(part_of(path))
    above = {name for name in imports_of(path) if ORDER.index(name) > place}
    # The tiny ResNet of the tests is the tasks' own. A plan runs engines, and an engine may be asked to let one choose.
    known = {"testing.py": {"tasks"}, "engine/auto.py": {"simulate"}}
    assert not above - known.get(path.relative_to(HOUSE).as_posix(), set())


def test_report_reads_files_and_trains_nothing() -> None:
    for path in (HOUSE / "report").glob("*.py"):
        assert imports_of(path) <= {"report", "trace"}
        assert "import torch" not in path.read_text()


def test_theory_knows_torch_and_the_trace_alone() -> None:
    for path in (HOUSE / "theory").glob("*.py"):
        assert imports_of(path) <= {"theory", "trace"}
        roots = {name.split(".")[0] for name in modules_of(path)}
        assert roots <= sys.stdlib_module_names | {"torch", "asyncprop"}, path


def test_only_the_table_knows_the_names_of_methods() -> None:
    for path in FILES:
        if part_of(path) in ("methods", "bench", "config", "exhibits"):
            continue
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"[\"'](async-lu|async-bu|sgd)[\"']", code) or "recipes" in path.name


def test_files_are_small() -> None:
    lengths = {str(path.relative_to(HOUSE)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}
