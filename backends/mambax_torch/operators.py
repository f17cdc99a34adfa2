"""How fused kernels become operators of PyTorch, and when they are called without one.

Operators are opaque to ``torch.compile`` in both directions, so that compiling takes as long for any L. Where
nothing can ask for a gradient and nothing is being traced, the kernels are called directly: an operator costs tens
of microseconds, which a one-token step would feel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

Operands = TypeVar("Operands", bound="tuple[Any, ...]")
Results = TypeVar("Results")  # a tensor, or a tuple of them

_IN_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", str | None: "str?"
}  # fmt: skip
_FLAGS = ("mask", "boundaries")
"""The tensors among operands that have no gradient."""


def may_call_directly(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels may be called as they are: plain tensors, no gradient wanted, nothing traced."""
    return are_plain(tensors) and not want_gradient(tensors)


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are tensors and nothing made of them, and nothing is being traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def want_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient of one of these is wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def differentiable_once(
    name: str,
    operands: type[Operands],
    *,
    forward: Callable[..., Results],
    room: Callable[..., Results],
    backward: Callable[..., Sequence[Tensor | None]],
    results: int = 1,
    keeps: bool = False,
    device_types: str | None = None,
) -> Callable[[Operands], Results]:
    """What calls kernels directly where it may, else as the operator `name`, whose gradient is `name`_backward.

    Both operators take the fields of a named tuple, one by one: their arguments are said there and nowhere else.

    Args:
        name: of the operator, as in "mambax::cpu_ssd".
        operands: the named tuple, a tensor first. Its tensors have gradients, except :data:`_FLAGS`.
        forward: (operands) to the results. With `keeps` it takes ``save: bool = False`` besides, and the last
            result is what `backward` starts from: no elements unless `save`. Returns no operand, nor a view of one.
        room: the arguments of `forward` to tensors like its results, whose values mean nothing.
        backward: (operands, the gradients of the results, but the last result itself with `keeps`) to the gradients
            of the tensors, in their order and of any dtype; None for what is None.
        results: how many there are.
        keeps: whether the last of them is kept for `backward`. It has no gradient.
        device_types: where the kernels work; anywhere when None.
    """
    kinds = {field: _IN_SCHEMAS[hint] for field, hint in get_type_hints(operands).items()}
    of = [field for field, kind in kinds.items() if kind.startswith("Tensor") and field not in _FLAGS]

    def run(*values: Any) -> Results:
        return forward(operands(*values[: len(kinds)]), *values[len(kinds) :])

    schema = _schema({**kinds, "save": "bool"} if keeps else kinds, results)
    operator = torch.library.custom_op(name, run, mutates_args=(), device_types=device_types, schema=schema)
    operator.register_fake(lambda *values: room(operands(*values[: len(kinds)]), *values[len(kinds) :]))
    backward_operator = _backward_operator(f"{name}_backward", operands, kinds, of, backward, results, device_types)

    def context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = (x for x, kind in zip(inputs, kinds.values(), strict=False) if kind.startswith("Tensor"))
        ctx.save_for_backward(*tensors, *(output[-1:] if keeps else ()))
        ctx.settings = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        ctx.set_materialize_grads(False)  # or zeros as large as what is kept would be made for it
        ctx.results = [(x.shape, x.dtype, x.device) for x in ((output,) if results == 1 else output)]

    def gradient(ctx: Any, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        known = [
            torch.zeros(shape, dtype=dtype, device=device) if x is None else x
            for x, (shape, dtype, device) in zip(of_results[: results - keeps], ctx.results, strict=False)
        ]
        given = [
            next(saved) if kind.startswith("Tensor") else setting
            for kind, setting in zip(kinds.values(), ctx.settings, strict=False)
        ]
        leading = (*known, next(saved)) if keeps else known
        found = dict(zip(of, backward_operator(*leading, *given), strict=True))
        gradients = (None if x is None else found.get(field) for field, x in zip(kinds, given, strict=True))
        return (*gradients, None) if keeps else tuple(gradients)  # `save` has none

    operator.register_autograd(gradient, setup_context=context)

    def call(given: Operands) -> Results:
        tensors = [x for x in given if isinstance(x, Tensor)]
        save = want_gradient(tensors)
        if not save and are_plain(tensors):
            return forward(given)
        return operator(*given, save) if keeps else operator(*given)

    return call


def _schema(arguments: Mapping[str, str], results: int) -> str:
    listed = ", ".join(f"{kind} {argument}" for argument, kind in arguments.items())
    return f"({listed}) -> ({', '.join(['Tensor'] * results)})"


def _backward_operator(
    name: str,
    operands: type[Operands],
    kinds: Mapping[str, str],
    of: Sequence[str],
    backward: Callable[..., Sequence[Tensor | None]],
    results: int,
    device_types: str | None,
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator that computes gradients of the fields `of`, without elements where a field is None."""

    def run(*values: Any) -> tuple[Tensor, ...]:
        given = operands(*values[results:])
        found = backward(given, *values[:results])
        return tuple(
            given[0].new_empty(0) if gradient is None else gradient.to(getattr(given, field).dtype)
            for field, gradient in zip(of, found, strict=True)
        )

    def room(*values: Any) -> tuple[Tensor, ...]:
        given = operands(*values[results:])
        fields = (getattr(given, field) for field in of)
        return tuple(
            given[0].new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in fields
        )

    schema = _schema({**{f"result_{i}": "Tensor" for i in range(results)}, **kinds}, len(of))
    operator = torch.library.custom_op(name, run, mutates_args=(), device_types=device_types, schema=schema)
    operator.register_fake(room)
    return operator
