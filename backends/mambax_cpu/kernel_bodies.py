"""From the Python of kernels to LLVM's instructions: one walk over the syntax tree emits all of it.

Kernels know few things: whole numbers, floats, lanes, addresses, and tuples of them; ``for`` over a range,
``while`` and ``if``; parts and intrinsics. The type of a variable is that of what it is first given. What is not
known is refused, with its line.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from mambax_cpu import arithmetic
from mambax_cpu.arithmetic import cast, value_of
from mambax_cpu.kernel_expressions import Expressions, Slot, loaded
from mambax_cpu.kernel_types import KernelError, Value, allocated, int64
from mambax_cpu.parts import Part, Text


class Loop:
    """Where `continue` and `break` go; the latter is made when it is needed."""

    def __init__(self, again: Any, after: Any = None) -> None:
        self.again, self.after = again, after


class Body:
    """Emits a function's body at the place of a builder.

    Args:
        call: emits the call of a part: takes it, the builder and the arguments.
        text: the function.
        builder: of ``llvmlite.ir``, within a function whose first block has room for variables.
        arguments: values, numbers, and tuples of them.
    """

    def __init__(
        self, call: Callable[[Part, Any, Sequence[Any]], Any], text: Text, builder: Any, arguments: Sequence[Any]
    ) -> None:
        self.text, self.builder = text, builder
        self.variables: dict[str, Any] = {}
        self.expressions = Expressions(call, text.names, self.variables, builder)
        self.end: Any = None  # the block behind the last statement, once something goes there
        self.result: Any = None  # the slots of what is returned from there
        self.loops: list[Loop] = []
        if len(text.parameters) != len(arguments):
            raise KernelError(
                f"{text.node.name}: expected {len(text.parameters)} arguments, found {len(arguments)}"
            )
        for name, argument in zip(text.parameters, arguments, strict=True):
            if name in text.assigned:
                self.assign(name, argument)
            else:
                self.variables[name] = argument

    def emit(self) -> Any:
        """Emit it; returns what it gives. The builder is behind it then."""
        *statements, last = self.text.node.body
        self.block(statements)
        leaves = self.builder.block.is_terminated or self.end is not None
        if isinstance(last, ast.Return) and last.value is not None and not leaves:
            return self._at(last, self.expressions.find, last.value)
        self.block([last])
        if not self.builder.block.is_terminated and self.text.returns:
            raise KernelError(f"{self.text.node.name}: gives something back, but not at its end")
        if self.end is not None:
            self._go(self.end)
            self.builder.position_at_end(self.end)
        return loaded(self.builder, self.result) if self.text.returns else None

    # --- variables ----------------------------------------------------------------------------------------------

    def assign(self, name: str, given: Any) -> None:
        """Give a variable a value."""
        self.variables[name] = self._kept(name, self.variables.get(name), given)

    def _kept(self, name: str, slot: Any, given: Any) -> Any:
        """The slots of a value, in which it is now: those it had, or new ones."""
        if isinstance(given, tuple):
            old = (None,) * len(given) if slot is None else slot
            if not isinstance(old, tuple) or len(old) != len(given):
                raise KernelError(f"{name}: is not the tuple that it was before; use another variable")
            inner = [self._kept(name, *pair) for pair in zip(old, given, strict=True)]
            return type(given)(*inner) if hasattr(given, "_fields") else tuple(inner)
        found = value_of(given)
        if slot is None:
            slot = Slot(found.type, allocated(self.builder, found.type.llvm))
        if isinstance(slot, tuple) or slot.type is not found.type:
            before = "a tuple" if isinstance(slot, tuple) else slot.type
            raise KernelError(f"{name}: expected {before} as before, found {found.type}; use another variable")
        self.builder.store(found.llvm, slot.place)
        return slot

    # --- statements -----------------------------------------------------------------------------------------------

    def block(self, statements: Sequence[ast.stmt]) -> None:
        """Emit statements, up to one that leaves."""
        for statement in statements:
            if self.builder.block.is_terminated:
                return
            emit = getattr(self, f"_{type(statement).__name__}", None)
            if emit is None:
                emit = self._unknown
            self._at(statement, emit, statement)

    def _at(self, node: Any, emit: Callable[[Any], Any], given: Any) -> Any:
        """Call a function; what it refuses has the line of the innermost statement."""
        try:
            return emit(given)
        except KernelError as error:
            if error.where:
                raise
            where = f"{self.text.names['__name__']}.{self.text.node.name}, line {node.lineno}"
            raise KernelError(str(error), where) from None

    def _unknown(self, node: Any) -> Any:
        raise KernelError(f"{type(node).__name__} is not known in kernels: {ast.unparse(node)[:60]!r}")

    def _go(self, block: Any) -> bool:
        """Go on there, unless the way has ended before; whether it has not."""
        goes = not self.builder.block.is_terminated
        if goes:
            self.builder.branch(block)
        return goes

    def _new(self) -> Any:
        return self.builder.append_basic_block()

    def _Pass(self, node: ast.Pass) -> None:
        pass

    def _Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.expressions.find(node.value)

    def _Assign(self, node: ast.Assign) -> None:
        given = self.expressions.find(node.value)
        for target in node.targets:
            self._give(target, given)

    def _give(self, target: ast.expr, given: Any) -> None:
        if isinstance(target, ast.Name):
            self.assign(target.id, given)
        elif isinstance(target, ast.Subscript):
            base, index = self.expressions.find(target.value), self.expressions.find(target.slice)
            arithmetic.stored(self.builder, base, index, given)
        elif isinstance(target, ast.Tuple) and isinstance(given, tuple) and len(target.elts) == len(given):
            for inner, value in zip(target.elts, given, strict=True):
                self._give(inner, value)
        else:
            raise KernelError(f"cannot give a value to {ast.unparse(target)!r}")

    def _AugAssign(self, node: ast.AugAssign) -> None:
        target = node.target
        if isinstance(target, ast.Subscript):
            base, index = self.expressions.find(target.value), self.expressions.find(target.slice)
            before = arithmetic.loaded(self.builder, base, index)
            after = arithmetic.binary(self.builder, node.op, before, self.expressions.find(node.value))
            arithmetic.stored(self.builder, base, index, after)
        elif isinstance(target, ast.Name):
            before = loaded(self.builder, self.variables.get(target.id))
            if before is None:
                raise KernelError(f"{target.id}: has no value here; give it one before")
            self.assign(
                target.id, arithmetic.binary(self.builder, node.op, before, self.expressions.find(node.value))
            )
        else:
            self._unknown(node)

    def _Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self.result = self._kept("what is returned", self.result, self.expressions.find(node.value))
        elif self.text.returns:
            raise KernelError("returns nothing here, and something elsewhere")
        if self.end is None:
            self.end = self._new()
        self._go(self.end)

    def _If(self, node: ast.If) -> None:
        known = self.expressions.condition(node.test)
        if isinstance(known, bool):
            self.block(node.body if known else node.orelse)
            return
        then, after = self._new(), self._new()
        other = self._new() if node.orelse else after
        self.builder.cbranch(known.llvm, then, other)
        reached = not node.orelse
        for block, statements in ((then, node.body), (other, node.orelse)):
            if statements:
                self.builder.position_at_end(block)
                self.block(statements)
                reached |= self._go(after)
        self.builder.position_at_end(after)
        if not reached:
            self.builder.unreachable()

    def _While(self, node: ast.While) -> None:
        self._no_else(node)
        again, inside = self._new(), self._new()
        self._go(again)
        self.builder.position_at_end(again)
        loop = Loop(again)
        known = self.expressions.condition(node.test)
        if isinstance(known, bool):
            self._go(inside if known else self._after(loop))
        else:
            self.builder.cbranch(known.llvm, inside, self._after(loop))
        self._inside(loop, inside, node.body)
        self._go(again)
        if loop.after is not None:
            self.builder.position_at_end(loop.after)

    def _For(self, node: ast.For) -> None:
        self._no_else(node)
        start, stop, step = self._range(node.iter)
        number = allocated(self.builder, int64.llvm)
        self.builder.store(start, number)
        again, inside, further = self._new(), self._new(), self._new()
        self._go(again)
        self.builder.position_at_end(again)
        loop, current = Loop(further), self.builder.load(number)
        self.builder.cbranch(self._more(current, stop, step), inside, self._after(loop))
        self.builder.position_at_end(inside)
        self._give(node.target, Value(int64, current))
        self._inside(loop, inside, node.body)
        self._go(further)
        self.builder.position_at_end(further)
        self.builder.store(self.builder.add(current, value_of(step).llvm, flags=["nsw"]), number)
        self._go(again)
        self.builder.position_at_end(loop.after)

    def _range(self, node: ast.expr) -> tuple[Any, Any, Any]:
        if not isinstance(node, ast.Call) or node.keywords or self.expressions.find(node.func) is not range:
            raise KernelError(f"expected a loop over a range, found {ast.unparse(node)!r}")
        given = [self.expressions.find(argument) for argument in node.args]
        start, stop = (0, given[0]) if len(given) == 1 else given[:2]
        step = given[2] if len(given) == 3 else 1
        step = step if isinstance(step, int) else Value(int64, cast(self.builder, step, int64))
        return cast(self.builder, start, int64), cast(self.builder, stop, int64), step

    def _more(self, current: Any, stop: Any, step: Any) -> Any:
        """Whether a range goes on; one with a step of 0 has no numbers."""
        b = self.builder
        below, above = b.icmp_signed("<", current, stop), b.icmp_signed(">", current, stop)
        if isinstance(step, int) and step != 0:
            return below if step > 0 else above
        upwards, downwards = (b.icmp_signed(sign, value_of(step).llvm, value_of(0).llvm) for sign in "><")
        return b.or_(b.and_(upwards, below), b.and_(downwards, above))

    def _inside(self, loop: Loop, block: Any, statements: Sequence[ast.stmt]) -> None:
        self.builder.position_at_end(block)
        self.loops.append(loop)
        self.block(statements)
        self.loops.pop()

    def _after(self, loop: Loop) -> Any:
        if loop.after is None:
            loop.after = self._new()
        return loop.after

    def _no_else(self, node: Any) -> None:
        if node.orelse:
            raise KernelError("a loop with else is not known in kernels")

    def _Break(self, node: ast.Break) -> None:
        self._go(self._after(self.loops[-1]))

    def _Continue(self, node: ast.Continue) -> None:
        self._go(self.loops[-1].again)
