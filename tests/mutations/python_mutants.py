"""Mutants of Python functions: the changed code object takes the place of the one in this process."""

import ast
import copy
import importlib
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from sqlalchemy import Engine

from tests.mutations.mutant import ROOT, InvalidMutantError, Mutant

FILES = (
    "trueup/gate/decision.py",
    "trueup/gate/denial.py",
    "trueup/gate/heartbeat.py",
    "trueup/gate/holds.py",
    "trueup/gate/modes.py",
    "trueup/gate/owed_charges.py",
    "trueup/gate/provider_calls.py",
    "trueup/usage/charges.py",
    "trueup/llm/output_cap.py",
    "trueup/llm/calls.py",
)

_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class _Separate(ast.NodeTransformer):
    """Gives each operator a node of its own: the parser uses one node for all operators of a kind."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return type(node)() if type(node) in _OPERATORS else super().generic_visit(node)


class PythonFunction:
    """A function or method of a module. `path`: its name in the module, with the class."""

    def __init__(self, module: str, path: str, tree: ast.Module, node: ast.FunctionDef) -> None:
        self.name = f"{module}:{path}"
        self._tree = tree
        self._node = node
        self._live = _function(module, path)
        self._code = self._live.__code__

    def install(self, mutant: Mutant) -> None:
        try:
            self._live.__code__ = mutant.code
        except ValueError as error:  # a variable of the enclosing function is used no more
            raise InvalidMutantError(str(error)) from error

    def install_again(self, mutant: Mutant, engine: Engine) -> None:
        """Do nothing: the function is not in a database."""

    def restore(self) -> None:
        self._live.__code__ = self._code

    def mutants(self) -> Iterator[Mutant]:
        """Make the mutants of the function's body."""
        for number, node in enumerate(_nodes(self._node)):
            for kind, replace in _changes(node):
                changed = copy.deepcopy(self._tree)
                twin = next(each for each in ast.walk(changed) if _is_same(each, self._node))
                assert isinstance(twin, ast.FunctionDef)
                place = list(_nodes(twin))[number]
                statement = _statement(twin, place)
                was = _text(statement)
                new = replace(place)
                _put(twin, place, new)
                now = _text(new if statement is place else statement)
                code = _code_of(compile(ast.fix_missing_locations(changed), self._code.co_filename, "exec"), self._code)
                yield Mutant(function=self, kind=kind, was=was, now=now, code=code)


def python_functions() -> list[PythonFunction]:
    """Return the functions of `FILES`."""
    found = []
    for file in FILES:
        module = file.removesuffix(".py").replace("/", ".")
        tree = _Separate().visit(ast.parse((ROOT / file).read_text()))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found.append(PythonFunction(module, node.name, tree, node))
            elif isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                found += [PythonFunction(module, f"{node.name}.{each.name}", tree, each) for each in methods]
    return found


def _function(module: str, path: str) -> FunctionType:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = vars(found)[name]
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__func__", found)
    while hasattr(found, "__wrapped__"):  # of a context manager, for example
        found = found.__wrapped__
    assert isinstance(found, FunctionType), path
    return found


def _is_same(node: ast.AST, other: ast.FunctionDef) -> bool:
    return isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (other.name, other.lineno)


def _nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    for statement in function.body:
        yield from ast.walk(statement)


def _statement(function: ast.FunctionDef, place: ast.AST) -> ast.AST:
    """Return the smallest statement with the place."""
    holders = [node for node in _nodes(function) if isinstance(node, ast.stmt) and place in ast.walk(node)]
    return min(holders, key=lambda node: sum(1 for _ in ast.walk(node)))


def _text(statement: ast.AST) -> str:
    """Return the code of a statement, of a compound one the condition."""
    head = statement.test if isinstance(statement, ast.If | ast.While) else statement
    return " ".join(ast.unparse(head).split())


def _put(function: ast.FunctionDef, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(function):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                setattr(parent, name, [new if each is old else each for each in value])


def _code_of(code: CodeType, old: CodeType) -> CodeType:
    """Find the code of a function in that of its module."""
    found = [code]
    for each in found:
        found += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return next(
        each for each in found if (each.co_qualname, each.co_firstlineno) == (old.co_qualname, old.co_firstlineno)
    )


def _changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Yield the kinds of change of this node, each with a function that makes the new node."""
    for new in _OPERATORS.get(type(node), ()):
        yield "operator", lambda _, new=new: new()
    match node:
        case ast.Name(id=name) if name in _NAMES:
            yield "extreme", lambda place: ast.Name(_NAMES[place.id], ast.Load())
        case ast.Constant(value=bool()):
            yield "constant", lambda place: ast.Constant(not place.value)
        case ast.Constant(value=0 | 1):
            yield "constant", lambda place: ast.Constant(1 - place.value)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", lambda place: place.operand
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare | ast.UnaryOp):  # another operator makes the contrary of these
                yield "contrary", _contrary
        case ast.Raise():
            yield "statement", lambda _: ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield "statement", lambda _: ast.Pass()
        case ast.AugAssign() | ast.Assign(targets=[ast.Attribute()]):
            yield "statement", lambda _: ast.Pass()
        case ast.BoolOp():
            yield "condition", lambda place: place.values[0]
            yield "condition", lambda place: place.values[-1]


def _contrary(place: Any) -> Any:
    place.test = ast.UnaryOp(ast.Not(), place.test)
    return place
