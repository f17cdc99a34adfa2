"""What kernels may call of ours: parts, and intrinsics; and the syntax trees of all that is written for them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from mambax_cpu import object_files
from mambax_cpu.kernel_types import KernelError, Type


class Part:
    """A function that kernels call.

    Args:
        function: Python.
        inlined: whether its instructions take the place of each call.
    """

    def __init__(self, function: Callable[..., Any], inlined: bool = False) -> None:
        self.function, self.inlined = function, inlined


class Selection:
    """A choice of a part by the types of the arguments, which it is then called with.

    Args:
        choose: takes the types and returns the part.
    """

    def __init__(self, choose: Callable[..., Part]) -> None:
        self.choose = choose


class Intrinsic:
    """Instructions of LLVM's that kernels use as a function.

    Args:
        define: takes a :class:`Context` and the types of the arguments. Returns the signature and a function
            (context, builder, signature, arguments), of LLVM's values, that emits the instructions and returns the
            result.
    """

    def __init__(self, define: Callable[..., Any]) -> None:
        self.define = define


class Context:
    """What an intrinsic may ask for."""

    def get_value_type(self, kind: Type) -> Any:
        """LLVM's type of values of a type."""
        return kind.llvm

    def get_dummy_value(self) -> Any:
        """What an intrinsic without a result returns."""
        return None


class Text(NamedTuple):
    """What is known of a function from its text."""

    node: ast.FunctionDef
    parameters: list[str]
    assigned: frozenset[str]  # the names of variables, parameters among them
    returns: bool  # whether it gives something back
    names: dict[str, Any]  # what its other names stand for


@cache
def _definitions(text: str) -> dict[int, ast.FunctionDef]:
    """The functions that a text defines, by the line on which they begin."""
    found = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return {(node.decorator_list or [node])[0].lineno: node for node in found}


@cache
def text_of(function: Callable[..., Any]) -> Text:
    """The syntax tree of a function, from its file as it was when it was imported.

    Raises:
        KernelError: where it is not to be found there, and for parameters that need not be given one by one.
    """
    code, name = function.__code__, f"{function.__module__}.{function.__qualname__}"
    node = _definitions(object_files.text(function.__module__)).get(code.co_firstlineno)
    if node is None or node.name != function.__name__:
        raise KernelError(f"{name}: not in the text of its file; define it with def, at the top of a file")
    a = node.args
    if a.posonlyargs or a.kwonlyargs or a.vararg or a.kwarg or a.defaults:
        raise KernelError(f"{name}: expected plain parameters without defaults")
    inside = [inner for statement in node.body for inner in ast.walk(statement)]
    assigned = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    returns = any(isinstance(n, ast.Return) and n.value is not None for n in inside)
    closed = zip(code.co_freevars, function.__closure__ or (), strict=True)
    builtin = function.__builtins__ if isinstance(function.__builtins__, dict) else vars(function.__builtins__)
    names = {**builtin, **function.__globals__, **{free: cell.cell_contents for free, cell in closed}}
    return Text(node, [argument.arg for argument in a.args], frozenset(assigned), returns, names)
