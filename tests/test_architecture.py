"""The shape of the code as a test: who may import whom, that the core is pure, that money meets no float."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parent
PACKAGES = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists())
FILES = sorted(ROOT.rglob("*.py"))

#: Which packages each may import. Imports point one way; stages meet in core's types and in topics and tables.
MAY_IMPORT = {
    "core": set(),
    "infra": {"core"},
    "producer": {"core", "infra"},
    "catalog": {"core", "infra"},
    "rating": {"core", "infra"},
    "billing": {"core", "infra"},
    "cli": {"core", "infra", "producer", "catalog", "rating", "billing"},
}
#: Standard modules that reach outside the process, tell the time, roll dice, or write: not in the core.
IMPURE = {
    "asyncio",
    "concurrent",
    "http",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "uuid",
}
IMPURE_CALLS = {"breakpoint", "input", "open", "print", "float"}
CLOCKS = {"now", "utcnow", "today"}
#: The one reader of the environment; commands may also pass it on to the processes they start.
MAY_READ_ENVIRONMENT = {"infra/settings.py"}
MAY_PASS_ENVIRONMENT_ON = {"cli", "infra"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module a file imports, also inside functions and for typing only."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: expected an absolute import"
            yield node.lineno, f"{node.module}"
            if node.module == "pipeline":
                yield from ((node.lineno, f"pipeline.{alias.name}") for alias in node.names)
