"""Layers whose weight a module reads itself, without calling the layer, as the source of the module's class tells."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn


# A path from a module to something in it, such as ("convs", "*", "weight"), and the tests of the `if`s around its use,
# each with how it must come out.
Path = tuple[str, ...]
Guards = tuple[tuple[ast.expr, bool], ...]

ITEM = "*"  # any item of a container
PARAMETERS = ("weight", "bias")
# What is asked of a tensor without computing with its numbers.
QUESTIONS = (
    "device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "is_meta", "itemsize", "ndim", "numel",
    "requires_grad", "shape", "size",
)  # fmt: skip
ASKING = ("getattr", "hasattr", "id", "isinstance", "type")
# Read on a branch that no model takes: the layer is called whenever it is used.
NEVER_TAKEN = {("transformers.models.deberta.modeling_deberta", "DisentangledSelfAttention", ("in_proj",))}


def layers_read(module: nn.Module) -> Iterator[str]:
    """
    Names, within a module, of layers whose weight or bias its `forward` computes with, on any path that it can take.

    `F.conv1d(x, self.conv.weight)` reads one, `self.fc(x.to(self.fc.weight.dtype))` reads none. An `if` that asks for
    nothing but the module's own attributes, such as `self.pretraining_tp > 1`, is decided by them. Classes of torch,
    and those whose source isn't there, read nothing.
    """
    kind: Any = type(module)
    for path, guards in _reads_of(kind):
        known = (kind.__module__, kind.__name__, path) in NEVER_TAKEN
        if not known and all(_value(test, module) in (expected, None) for test, expected in guards):
            yield from _names(module, path)


def _names(module: nn.Module, path: Path) -> list[str]:
    """The modules that a path leads to."""
    reached = {"": module}
    for part in path:
        reached = {
            f"{name}.{child}".lstrip("."): found
            for name, parent in reached.items()
            for child, found in parent.named_children()
            if part in (ITEM, child)
        }
    return list(reached)


def _value(test: ast.expr, module: nn.Module) -> bool | None:
    """Result of a test for a module, if its attributes alone decide it."""
    try:
        return bool(_evaluated(test, module))
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _evaluated(node: ast.expr, module: nn.Module) -> Any:
    """
    Raises:
        `LookupError`: if something else than the module's numbers, texts and flags decides.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Attribute(attr=name) if name != "training":
            path = _path(node, {"self": ()})
            found: Any = module
            for part in path or ():
                found = getattr(found, part)
            if path and isinstance(found, (bool, int, float, str, type(None))):
                return found
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluated(operand, module)
        case ast.BoolOp(op=op, values=values):
            ends = isinstance(op, ast.Or)  # what one of them has to be to decide
            outcomes = [_value(value, module) for value in values]
            if ends in outcomes:
                return ends
            if None not in outcomes:
                return not ends
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return COMPARISONS[type(op)](_evaluated(left, module), _evaluated(right, module))
    raise LookupError


COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


@lru_cache(maxsize=1024)
def _reads_of(kind: Any) -> tuple[tuple[Path, Guards], ...]:
    """Attributes that a class reads in the methods that its `forward` leads to, with the tests around each place."""
    reads: list[tuple[Path, Guards]] = []
    waiting, seen = [(kind.__mro__, "forward")], set()
    while waiting:
        classes, name = waiting.pop()
        owner = next((number for number, c in enumerate(classes) if name in vars(c)), None)
        if owner is None or classes[owner].__module__.partition(".")[0] == "torch" or (classes[owner], name) in seen:
            continue
        seen.add((classes[owner], name))
        for function in _functions(vars(classes[owner])[name]):
            node = _definitions(function.__code__.co_filename).get(function.__code__.co_firstlineno)
            if node is not None:
                method = _Method(node)
                reads += method.reads
                waiting += [(kind.__mro__, other) for other in method.methods]
                waiting += [(classes[owner + 1 :], other) for other in method.of_bases]
    return tuple(reads)


def _functions(value: Any) -> Iterator[FunctionType]:
    """A method as it was written, without its decorators."""
    value = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
    if isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():  # of a decorator that does not say what it wraps
            if isinstance(cell.cell_contents, FunctionType):
                yield from _functions(cell.cell_contents)


@lru_cache(maxsize=16)
def _definitions(file: str) -> dict[int, ast.FunctionDef]:
    """The functions of a source file, by the line that they begin in, decorators included."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {min([node.lineno, *(part.lineno for part in node.decorator_list)]): node for node in functions}


def _path(node: ast.AST | None, aliases: dict[str, Path]) -> Path | None:
    """Path from the module that an expression stands for, or `None`."""
    match node:
        case ast.Name(id=name):
            return aliases.get(name)
        case ast.Attribute(value=value, attr=name):
            path = _path(value, aliases)
            return None if path is None else (*path, name)
        case ast.Subscript(value=value):
            path = _path(value, aliases)
            return None if path is None else (*path, ITEM)
    return None


class _Method(ast.NodeVisitor):
    """Attributes that a method reads, and methods it calls: of its class (`methods`), of `super()` (`of_bases`)."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.reads: list[tuple[Path, Guards]] = []
        self.methods: set[str] = set()
        self.of_bases: set[str] = set()
        self.guards: Guards = ()
        arguments = [*function.args.posonlyargs, *function.args.args]
        self.aliases: dict[str, Path] = {arguments[0].arg: ()} if arguments else {}
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._alias(name, _path(value, self.aliases))
                case (
                    ast.For(target=ast.Name(id=name), iter=items)
                    | ast.comprehension(target=ast.Name(id=name), iter=items)
                ):
                    path = _path(items, self.aliases)
                    self._alias(name, None if path is None else (*path, ITEM))
        for statement in function.body:
            self.visit(statement)

    def _alias(self, name: str, path: Path | None) -> None:
        if path and name not in self.aliases:
            self.aliases[name] = path

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        before = self.guards
        for branch, expected in ((node.body, True), (node.orelse, False)):
            self.guards = (*before, (node.test, expected))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
        self.guards = before

    visit_IfExp = visit_If

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id=name) if name in ASKING:
                return
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                self.of_bases.add(name)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in QUESTIONS:
            return
        path = _path(node, self.aliases)
        if path is not None and isinstance(node.ctx, ast.Load):
            if len(path) == 1:
                self.methods.add(path[0])
            elif path[-1] in PARAMETERS:
                self.reads.append((path[:-1], self.guards))
        self.generic_visit(node)
