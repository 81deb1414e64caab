"""The import law, host-only modules, limits on size and shape, read from the code itself; no exceptions are listed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxserve"

# fmt: off
ORDER = (
    "core", "telemetry", "text", "quant", "sharding", "pallas", "models", "checkpoint", "kv", "lora", "sampling",
    "engine", "server", "bench", "launch", "cli",
)
# fmt: on
"""A package may import itself and packages before it. The root (`jaxserve/__init__.py`) may name anything, lazily."""

# fmt: off
HOST_ONLY = (
    "core.*", "telemetry.*", "text.*", "models.spec", "kv.pages", "kv.prefix", "kv.salt", "kv.manager", "sampling.stop",
    "sampling.validate", "engine.sequence", "engine.policy", "engine.scheduler", "engine.queue", "engine.slots",
    "engine.admission", "engine.preemption", "engine.fairness", "engine.intake", "engine.pace", "engine.watchdog",
    "engine.logprobs", "engine.api", "engine.fake", "engine.generation", "server.*", "bench.workload", "bench.client",
    "bench.report", "bench.openai_url", "bench.serve", "bench.abuse.*",
)
# fmt: on
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "orbax", "optax", "chex"}


@dataclass(frozen=True)
class Module:
    path: Path

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def short(self) -> str:
        return self.name.removeprefix("jaxserve").removeprefix(".")

    @property
    def in_pallas(self) -> bool:
        return self.short.split(".")[0] == "pallas"

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"

    def imports(self, nodes: Iterator[ast.AST] | None = None) -> set[str]:
        """Full names that the module's import statements mention, at any level of nesting."""
        found = set()
        for node in ast.walk(self.tree) if nodes is None else nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.at(node)}: relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found


MODULES = {module.name: module for module in map(Module, sorted(PACKAGE.rglob("*.py")))}


def is_host_only(module: Module) -> bool:
    return any(fnmatch(module.short, pattern) for pattern in HOST_ONLY)


def target(name: str) -> str:
    """The module that an imported name lives in: itself, or what it is taken from."""
    return name if name in MODULES else name.rpartition(".")[0]


def device_chain(name: str, seen: set[str]) -> list[str] | None:
    """How a module comes to import a device library, or None."""
    for imported in MODULES[name].imports():
        if imported.split(".")[0] in DEVICE_LIBRARIES:
            return [name, imported]
        within = target(imported)
        if within.split(".")[0] == "jaxserve" and within != "jaxserve" and within not in seen:
            seen.add(within)
            if (rest := device_chain(within, seen)) is not None:
                return [name, *rest]
    return None


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_package_is_in_the_order() -> None:
    assert {module.short.split(".")[0] for module in MODULES.values()} - {""} <= set(ORDER)


def test_imports_follow_the_order() -> None:
    offences = []
    for module in MODULES.values():
        if not module.short:
            continue
        rank = ORDER.index(module.short.split(".")[0])
        for imported in module.imports():
            parts = imported.split(".")
            if parts[0] == "jaxserve" and len(parts) > 1 and parts[1] in ORDER and ORDER.index(parts[1]) > rank:
                offences.append(f"{module.name} imports {imported}")
    assert not offences, "\n".join(offences)


def test_every_internal_import_exists() -> None:
    """A module imported only inside a function would otherwise be missed until that function runs."""
    offences = [
        f"{module.name} imports {imported}"
        for module in MODULES.values()
        for imported in module.imports()
        if imported.split(".")[0] == "jaxserve" and target(imported) not in MODULES
    ]
    assert not offences, "\n".join(offences)


def test_packages_import_nothing_when_imported() -> None:
    """`import jaxserve.engine.api` runs every parent's `__init__`; those stay empty, but for the command line's own."""
    offences = []
    for module in MODULES.values():
        if module.path.name == "__init__.py" and module.short != "cli":
            imported = module.imports(iter(module.tree.body)) - {"__future__.annotations", "typing.TYPE_CHECKING"}
            offences += [f"{module.name} imports {name}" for name in imported]
    assert not offences, "\n".join(offences)


def test_host_only_patterns_match() -> None:
    for pattern in HOST_ONLY:
        assert any(fnmatch(module.short, pattern) for module in MODULES.values()), pattern


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if is_host_only(module)])
def test_host_only_by_its_imports(name: str) -> None:
    chain = device_chain(name, {name})
    assert chain is None, " -> ".join(chain or [])


def test_host_only_when_run() -> None:
    """In a fresh process none of them, nor the command line, brings a device library in."""
    names = [name for name, module in MODULES.items() if is_host_only(module) or module.short.startswith("cli")]
    names.remove("jaxserve.cli.__main__")
    script = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    found = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))\n"
        "    assert not found, f'{name} brings in {found}'\n"
    )
    arguments = [json.dumps(names), json.dumps(sorted(DEVICE_LIBRARIES))]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    offences = []
    for module in MODULES.values():
        length, most = len(module.text.splitlines()), 600 if module.in_pallas else 400
        if length > most:
            offences.append(f"{module.name}: {length} lines, at most {most}")
    assert not offences, "\n".join(offences)


def test_functions_are_short_and_narrow() -> None:
    offences = []
    for module in MODULES.values():
        most = 150 if module.in_pallas else 60
        for function in functions(module):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > most:
                offences.append(f"{module.at(function)} {function.name}: {length} lines, at most {most}")
            arguments = function.args
            names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if len(set(names) - {"self", "cls"}) > 8:
                offences.append(f"{module.at(function)} {function.name}: {len(names)} parameters, at most 8")
    assert not offences, "\n".join(offences)


def test_classes_have_few_attributes() -> None:
    offences = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                stores = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
                attributes = {
                    each.attr
                    for each in stores
                    if isinstance(each.ctx, ast.Store) and isinstance(each.value, ast.Name) and each.value.id == "self"
                }
                if len(attributes) > 15:
                    offences.append(f"{module.at(node)} {node.name}: {len(attributes)} attributes, at most 15")
    assert not offences, "\n".join(offences)


def test_environment_is_read_in_one_place() -> None:
    offences = [
        module.at(node)
        for module in MODULES.values()
        if module.short != "core.environment"
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & _names(node))
    ]
    assert not offences, "\n".join(offences)


def test_only_the_command_line_prints() -> None:
    offences = [
        module.at(node)
        for module in MODULES.values()
        if not module.short.startswith("cli")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
    ]
    assert not offences, "\n".join(offences)


def test_mesh_axes_are_named_in_sharding_only() -> None:
    """`data` is an everyday word, so it counts where a partition is spelt; the other two count everywhere."""
    offences = []
    for module in MODULES.values():
        if module.short.split(".")[0] == "sharding" or module.short == "core.config":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and node.value in ("expert", "tensor"):
                offences.append(f"{module.at(node)}: {node.value!r}")
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
                key = node.slice
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    offences.append(f"{module.at(node)}: {key.value!r}")
            if isinstance(node, ast.Call) and _called(node) in ("PartitionSpec", "P", "Mesh", "make_jax_mesh"):
                constants = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                offences += [f"{module.at(node)}: {value!r}" for value in constants if isinstance(value, str)]
    assert not offences, "\n".join(offences)


def test_no_exception_is_swallowed() -> None:
    offences = [
        module.at(node)
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.ExceptHandler) and all(isinstance(each, ast.Pass) for each in node.body))
        or (isinstance(node, ast.ExceptHandler) and node.type is None)
        or (isinstance(node, ast.Call) and _called(node) == "suppress" and "Exception" in ast.dump(node.args[0]))
    ]
    assert not offences, "\n".join(offences)


def test_no_global_is_rebound() -> None:
    offences = [
        module.at(node) for module in MODULES.values() for node in ast.walk(module.tree) if isinstance(node, ast.Global)
    ]
    assert not offences, "\n".join(offences)


def test_modules_say_what_they_do() -> None:
    offences = [name for name, module in MODULES.items() if module.text.strip() and not ast.get_docstring(module.tree)]
    assert not offences, "\n".join(offences)


def test_files_are_named_for_a_noun() -> None:
    banned = {"utils", "util", "helpers", "misc", "common", "v2", "experimental"}
    offences = [name for name in MODULES if banned & set(name.split("."))]
    assert not offences, "\n".join(offences)


def test_checks_are_switched_off_with_a_reason() -> None:
    """`# noqa: CODE - why` and `# type: ignore[code]  # why`, never bare."""
    bare = re.compile(r"# noqa(?!: [A-Z0-9, ]+ - \S)|# type: ignore(?!\[[a-z-]+(, [a-z-]+)*\]  # \S)")
    offences = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert not offences, "\n".join(offences)


def _names(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
