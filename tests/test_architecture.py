"""The shape of the code as a test: who may import whom, that the core is pure, that money meets no float."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parent
PACKAGES = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists())
FILES = sorted(ROOT.rglob("*.py"))

#: Which packages each may import. Imports point one way; stages meet in core's types and in topics and tables.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "infra": set(),
    "producer": {"infra"},
    "catalog": {"core", "infra"},
    "rating": {"core", "infra"},
    "billing": {"core", "infra"},
    "operations": {"core", "infra"},
    "documents": {"core", "infra"},
    "cli": {"core", "infra", "producer", "catalog", "rating", "billing", "operations", "documents"},
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
#: What the core imports besides. Each computes and does nothing else, and is told what it may compute.
LIBRARIES_OF_CORE = {
    "simpleeval": "meters' expressions: a safe evaluator is better kept by its maintainers than written again",
}
IMPURE_CALLS = {"breakpoint", "input", "open", "print", "float"}
CLOCKS = {"now", "utcnow", "today"}
#: The one reader of the environment; others may only pass it on to the processes they start.
READS_ENVIRONMENT = "infra/settings.py"


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


def test_the_table_names_every_package() -> None:
    assert sorted(MAY_IMPORT) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    allowed = {package, *MAY_IMPORT[package]}
    wrong = [
        f"{name_of(path)}:{line}: {package} may import {sorted(allowed)}, got {module}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, module in imported(path)
        if module.split(".")[0] == "pipeline" and module != "pipeline" and module.split(".")[1] not in allowed
    ]
    assert wrong == []


def test_the_core_imports_only_the_standard_library_itself_and_what_is_listed() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in sorted((ROOT / "core").rglob("*.py"))
        for line, module in imported(path)
        if not module.startswith("pipeline.core")
        and module not in LIBRARIES_OF_CORE
        and (module.split(".")[0] not in sys.stdlib_module_names or module.split(".")[0] in IMPURE)
    ]
    assert wrong == []


def impurities(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        match node:
            case ast.Constant(value=float() | complex()):
                what = f"a float, {node.value!r}"
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                what = "async"
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
                what = f"{name}()"
            case ast.Call(func=ast.Attribute(attr=name)) if name in CLOCKS:
                what = f"a clock, {name}()"
            case ast.BinOp(op=ast.Div()):
                what = "/, which makes floats of integers"
            case ast.Global():
                what = "global state"
            case _:
                continue
        yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}: {what}"


def test_the_core_is_pure() -> None:
    """No float, clock, input or output, async: same arguments, same result."""
    assert [found for path in sorted((ROOT / "core").rglob("*.py")) for found in impurities(path)] == []


def test_impurities_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above sees what it is meant to see."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "impure.py"
    file.write_text("x = 0.1\ny = 1 / 2\nasync def f(): ...\nopen('x')\ndatetime.now()\nfloat('1')\n")
    found = {text.split(": ")[1].split(",")[0] for text in impurities(file)}
    assert found == {"a float", "/", "async", "open()", "a clock", "float()"}


def reads_environment(path: Path) -> Iterator[int]:
    for node in ast.walk(tree(path)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "getenv" | "environb"):
                yield node.lineno
            case ast.ImportFrom(module="os", names=names) if {n.name for n in names} & {
                "environ",
                "getenv",
                "environb",
            }:
                yield node.lineno


def passed_on(path: Path) -> set[int]:
    """Lines that spread the environment into a new one, ``{**os.environ, …}``, for a process to be started."""
    return {
        value.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }


def test_only_settings_reads_the_environment() -> None:
    wrong = [
        f"{name_of(path)}:{line}"
        for path in FILES
        if name_of(path) != READS_ENVIRONMENT
        for line in reads_environment(path)
        if line not in passed_on(path)
    ]
    assert wrong == []


def test_no_file_names_a_machine_s_path() -> None:
    wrong = [
        f"{name_of(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(place in line for place in ("/root/", "/work/", "/home/"))
    ]
    assert wrong == []


def test_the_core_imports_without_any_other_third_party_library(tmp_path: Path) -> None:
    """In a process that sees nothing but the standard library, this package and what is listed."""
    for name in LIBRARIES_OF_CORE:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        (tmp_path / Path(spec.origin).name).symlink_to(spec.origin)
    modules = [f"pipeline.core.{path.stem}" for path in (ROOT / "core").glob("*.py") if path.stem != "__init__"]
    seen = [str(ROOT.parent), str(tmp_path)]
    program = f"import sys; sys.path += {seen!r}; import {', '.join(sorted(modules))}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
