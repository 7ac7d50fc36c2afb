"""The order of the package's rooms: a file imports from rooms below its own, and no modules import in a circle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from torch import Tensor, nn


ROOT = Path(__file__).parent.parent / "peft_ext"

# From the ground floor up. Rooms of one line do not import each other. A package's `__init__` may import all of it.
ORDER = {
    "peft_ext": [
        "_version extras io preserve commands.method_names",
        "hf",
        "sparse",
        "tuners",
        "knockout mtl",
        "install export",
        "conversion evaluation factory train",
        "api",
        "__init__",
        "commands",
        "autoload cli install.autoload_hook",
    ],
    "peft_ext.sparse": [
        "another_base memory checks fingerprint",
        "support",
        "ops",
        "transposed",
        "bases",
        "selection",
        "config delta",
        "layers",
        "choose",
        "model",
        "report",
    ],
    "peft_ext.tuners": ["neuroada gps psn mores"],
    "peft_ext.knockout": ["model", "cut", "prompts", "sweep plots", "read", "ask", "page", "cli"],
    "peft_ext.mtl": [
        "aggregators metrics",
        "parallel",
        "data",
        "conflicts",
        "gradients",
        "config callback state evaluation",
        "trainer",
        "sft",
    ],
}

# These rooms are read, tested and benchmarked without PEFT.
TORCH_ALONE = (
    "peft_ext.sparse.ops",
    "peft_ext.sparse.support",
    "peft_ext.sparse.memory",
    "peft_ext.sparse.another_base",
    "peft_ext.sparse.fingerprint",
)
LIBRARIES = {"torch", "triton", "peft_ext", *sys.stdlib_module_names}

# Imports that should not be. Mend and delete them; add none.
EXCEPTIONS = {
    # The figure takes the report's class, and the report has a method that draws.
    ("peft_ext.sparse.report.selection_report", "peft_ext.sparse.report.plot"),
    # The kernels ask their package which dtypes they take, and it imports them on first use.
    ("peft_ext.sparse.ops.gpu", "peft_ext.sparse.ops.gpu.launch"),
}


def modules(root: Path) -> dict[str, Path]:
    """The package's files by module name."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


def named(module: str, path: Path) -> Iterator[str]:
    """Dotted names that a file imports: at its top, inside functions, for type checkers, by name, and lazily."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = absolute("." * node.level, package)
            base = ".".join(filter(None, (start, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield absolute(name.value, package)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            yield from (f"{package}.{value}" for value in ast.literal_eval(node.value).values())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("peft_ext."):
            yield node.value  # of a command `python -m`, or for importlib


def absolute(name: str, package: str) -> str:
    """A name that may begin with dots, as seen from a package."""
    level = len(name) - len(name.lstrip("."))
    parts = package.split(".")[: 1 - level or None] if level else []
    return ".".join(filter(None, (*parts, name.lstrip("."))))


def imports_of(root: Path) -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    files = modules(root)
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for name in named(module, path):
            target = name
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != module and name.count(" ") == 0:
                graph[module].add(target)
    return graph


def floor_of(module: str, package: str) -> tuple[int, str]:
    """Floor and room of a module within a package."""
    name = module.removeprefix(package).lstrip(".") or "__init__"
    rooms = {room: floor for floor, line in enumerate(ORDER[package]) for room in line.split()}
    rooms.setdefault("__init__", len(ORDER[package]))
    fitting = [room for room in rooms if name == room or name.startswith(f"{room}.")]
    assert fitting, f"{module} lies in no room of ORDER[{package!r}]: give it a place there."
    room = max(fitting, key=len)
    return rooms[room], room


def upward(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of a room that is not below the importer's."""
    wrong = set()
    for package in ORDER:
        inside = {m for m in graph if m == package or m.startswith(f"{package}.")}
        for module in inside:
            own, room = floor_of(module, package)
            for target in graph[module] & inside:
                floor, other = floor_of(target, package)
                if room != other and floor >= own:
                    wrong.add((module, target))
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def without(graph: dict[str, set[str]], edges: set[tuple[str, str]]) -> dict[str, set[str]]:
    return {module: {t for t in targets if (module, t) not in edges} for module, targets in graph.items()}


@pytest.fixture(scope="module")
def graph():
    return imports_of(ROOT)


def test_no_file_imports_from_above(graph):
    found = upward(graph) - EXCEPTIONS
    assert not found, "\n".join(f"{module} imports {target}" for module, target in sorted(found))


def test_no_modules_import_in_a_circle(graph):
    found = circle(without(graph, EXCEPTIONS))
    assert not found, "imports in a circle: " + " <- ".join(found)


def test_every_exception_is_still_one(graph):
    wrong = upward(graph)
    for edge in EXCEPTIONS:
        assert edge in wrong or circle(without(graph, EXCEPTIONS - {edge})), f"{edge} is mended: delete it"


@pytest.mark.parametrize("room", TORCH_ALONE)
def test_the_operations_need_torch_alone(graph, room):
    for module, path in modules(ROOT).items():
        if module == room or module.startswith(f"{room}."):
            assert all(target.startswith(TORCH_ALONE) for target in graph[module]), module
            assert {name.split(".")[0] for name in named(module, path)} <= LIBRARIES, module


def private_names(root: Path) -> set[tuple[str, str]]:
    """Modules, and private names of other folders' functions and classes that they import or call."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in modules(root).items()}
    folders = {module: module.rpartition(".")[0] for module in trees}
    defined: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.startswith("_"):
                defined.setdefault(node.name, set()).add(folders[module])
    found = set()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
                names = [node.attr]
            found |= {(module, name) for name in names if defined.get(name) and folders[module] not in defined[name]}
    torchs = {*dir(nn.Module()), *dir(Tensor)}
    return {(module, name) for module, name in found if name not in torchs}


def test_no_private_names_of_another_folder():
    found = private_names(ROOT)
    assert not found, "\n".join(f"{module} uses {name}" for module, name in sorted(found))


def test_imports_of_every_kind_are_seen(tmp_path):
    """A small package that imports in each way, and a circle through a function."""
    root = tmp_path / "peft_ext"
    (root / "low").mkdir(parents=True)
    files = {
        "__init__.py": "_LAZY = {'A': 'low.a'}\n",
        "low/__init__.py": "import importlib\nimportlib.import_module('.c', __name__)\n",
        "low/a.py": "from __future__ import annotations\ndef f():\n    from ..high import g\n",
        "low/b.py": "import subprocess\nsubprocess.run(['python', '-m', 'peft_ext.high'])\n",
        "low/c.py": "from . import b\n",
        "high.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft_ext.low.a\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    found = {module.removeprefix("peft_ext"): targets for module, targets in imports_of(root).items()}
    assert found == {
        "": {"peft_ext.low.a"},
        ".low": {"peft_ext.low.c"},
        ".low.a": {"peft_ext.high"},
        ".low.b": {"peft_ext.high"},
        ".low.c": {"peft_ext.low.b"},
        ".high": {"peft_ext.low.a"},
    }
    assert {frozenset(pair) for pair in pairwise(circle(imports_of(root)))} == {
        frozenset({"peft_ext.low.a", "peft_ext.high"})
    }
