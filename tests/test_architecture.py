"""The import law and the limits of size and shape, read off the code itself. There are no exceptions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxserve"

# A package may import itself and those before it.
ORDER = (
    "core", "telemetry", "text", "quant", "sharding", "pallas", "models", "checkpoint", "kv", "lora", "sampling",
    "engine", "server", "bench", "launch", "cli",
)  # fmt: skip

HOST_ONLY = (
    "jaxserve.core", "jaxserve.telemetry", "jaxserve.text", "jaxserve.models.spec", "jaxserve.kv.pages",
    "jaxserve.kv.prefix", "jaxserve.kv.manager", "jaxserve.sampling.stop", "jaxserve.sampling.validate",
    "jaxserve.engine.sequence", "jaxserve.engine.policy", "jaxserve.engine.scheduler", "jaxserve.engine.api",
    "jaxserve.engine.fake", "jaxserve.engine.generation", "jaxserve.server",
)  # fmt: skip

MESH_AXES = {"data", "expert", "tensor"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_generated" not in path.parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere in it, functions and type-checking blocks included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_order_names_every_package() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found <= set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_up(path: Path) -> None:
    parts = name_of(path).split(".")
    if len(parts) == 1:
        return
    allowed = set(ORDER[: ORDER.index(parts[1]) + 1])
    for imported in imports(path):
        if imported.startswith("jaxserve."):
            package = imported.split(".")[1]
            assert package in allowed, f"{name_of(path)} imports {imported}, which stands below it"


@pytest.mark.parametrize("name", HOST_ONLY)
def test_host_only_modules_never_import_jax(name: str) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        f"module = importlib.import_module({name!r})\n"
        "path = getattr(module, '__path__', None)\n"
        "for info in pkgutil.walk_packages(path or [], module.__name__ + '.') if path else []:\n"
        "    importlib.import_module(info.name)\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_fit_on_a_screen(path: Path) -> None:
    kernels = "pallas" in path.parts
    lines = len(path.read_text().splitlines())
    assert lines <= (600 if kernels else 400), f"{lines} lines"
    for function in functions(path):
        assert function.end_lineno is not None
        size = function.end_lineno - function.lineno + 1
        assert size <= (150 if kernels else 60), f"{function.name}: {size} lines"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_functions_take_at_most_eight_parameters(path: Path) -> None:
    for function in functions(path):
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        assert count <= 8, f"{function.name}: {count} parameters"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_classes_have_at_most_fifteen_attributes(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            stored = {
                inner.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            }
            assert len(stored) <= 15, f"{node.name}: {sorted(stored)}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    if name_of(path) == "jaxserve.core.config":
        return
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")), f"line {node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_cli_prints(path: Path) -> None:
    if name_of(path).startswith("jaxserve.cli"):
        return
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), (
            f"line {node.lineno}"
        )


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_mesh_axes_are_named_only_in_sharding(path: Path) -> None:
    """A PartitionSpec, or a look-up in a mesh's shape, written elsewhere would name a mesh axis."""
    if name_of(path).startswith("jaxserve.sharding"):
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert callee not in ("PartitionSpec", "P"), f"line {node.lineno}"
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            key = node.slice
            assert not (isinstance(key, ast.Constant) and key.value in MESH_AXES), f"line {node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_is_swallowed(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"line {node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_modules_open_with_a_paragraph(path: Path) -> None:
    if path.name != "__init__.py" or path.read_text().strip():
        assert ast.get_docstring(parsed(path)), "no module docstring"
