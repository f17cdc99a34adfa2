"""Tokens through a stack of blocks by the fused CPU kernels, where that means the same as calling the blocks: one
for each row, or many.

A stack is examined once. What was found holds as long as its modules, their classes, attributes and hooks, and the
memory of their tensors are the same, which is looked at before every token.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from mambax.blocks import LayerState
from mambax_torch.fused import why_not_cpu_kernels
from mambax_torch.layers import HOOKS, CausalConv1d, Linear, RMSNorm, any_global_hook
from mambax_torch.quantized import QuantizedLinear

if TYPE_CHECKING:
    from mambax_cpu.mamba2_step import Mamba2Stack
    from mambax_cpu.stacks import Classes
    from mambax_cpu.step import Stack

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_OWN = ("mambax.blocks", "mambax.mamba2", "mambax_torch.layers", "mambax_torch.quantized")
"""Where the definitions are that the kernels compute; a patched class has its ``forward`` from elsewhere."""


@dataclass
class _Examined:
    """What a stack was found to be, and all that this rests on.

    Attributes:
        stack: for the kernels; None where the blocks have to be called one by one.
        narrow: dtype of the small weights and the convolution's state.
        wide: whether the residual stream is float32 whatever it is given as.
        blocks: the blocks; they are not kept alive.
        children: dictionaries of modules, and what was in them.
        classes: of the blocks and all below, in order.
        attributes: the dictionaries of their attributes, and how many there were.
        settings: of blocks, norms and mixers, what their users set: (dictionary, name), and what it was.
        forwards: what calling a module of each class ran.
        hooks: dictionaries of what is to run before and after ``forward`` and its gradient.
        tensors: dictionaries of parameters and buffers, and what was in them.
        addresses: of those that are not None.
        latest: the states that a step gave last, which are not kept alive, and where they lie.
    """

    stack: Stack | Mamba2Stack | None
    narrow: torch.dtype
    wide: bool
    blocks: list[ReferenceType[Any]]
    children: tuple[list[dict[str, Any]], list[Any]]
    classes: list[type]
    attributes: tuple[list[dict[str, Any]], list[int]]
    settings: tuple[list[tuple[Mapping[str, Any], str]], list[Any]]
    forwards: list[Any]
    hooks: list[dict[int, Any]]
    tensors: tuple[list[dict[str, Any]], list[Any]]
    addresses: list[int]
    latest: tuple[list[ReferenceType[Tensor]], list[int]] = ([], [])

    def tensors_if_same(self, layers: Sequence[Any]) -> list[Tensor] | None:
        """The parameters and buffers of the stack; None where something about it is not as it was."""
        blocks = [block() for block in self.blocks]
        modules = [*blocks, *self.children[1]]
        if len(layers) != len(blocks) or not all(map(is_, layers, blocks)) or not _same(*self.children):
            return None
        if not all(map(is_, map(type, modules), self.classes)):
            return None
        if list(map(len, self.attributes[0])) != self.attributes[1] or not all(
            map(is_, _classes().forwards(), self.forwards)
        ):
            return None
        if not all(map(is_, [values.get(name) for values, name in self.settings[0]], self.settings[1])):
            return None
        held = list(chain.from_iterable(tensors.values() for tensors in self.tensors[0]))
        if len(held) != len(self.tensors[1]) or not all(map(is_, held, [known() for known in self.tensors[1]])):
            return None
        tensors = [tensor for tensor in held if tensor is not None]
        if list(map(Tensor.data_ptr, tensors)) != self.addresses or not all(map(Tensor.is_contiguous, tensors)):
            return None
        return tensors


@cache
def _classes() -> Classes:
    from mambax_cpu.stacks import Classes

    from mambax_torch.models import Block, Mamba2Mixer, MambaMixer

    return Classes(Block, MambaMixer, Mamba2Mixer, RMSNorm, CausalConv1d, Linear, QuantizedLinear)


def _same(dictionaries: list[dict[str, Any]], values: list[Any]) -> bool:
    found = list(chain.from_iterable(dictionary.values() for dictionary in dictionaries))
    return len(found) == len(values) and all(map(is_, found, values))


_examined: WeakKeyDictionary[Any, _Examined] = WeakKeyDictionary()
"""By the first block."""


def decode_step(
    layers: Sequence[Any], hidden: Tensor, states: Sequence[LayerState]
) -> tuple[Tensor, tuple[LayerState, ...]] | None:
    """See :meth:`mambax.backend.Backend.decode_step`."""
    if hidden.is_cuda:
        from mambax_torch import graph_step

        return graph_step.decode_step(layers, hidden, states)
    if torch.compiler.is_compiling() or not len(layers) or _watched(hidden):
        return None
    from mambax_cpu import linear, prefill, stepping

    from mambax_torch.operators import are_plain, want_gradient

    batch, length, _ = hidden.shape
    few = batch * length <= linear.FEW_ROWS
    if few != (length == 1):  # of a few tokens in a row, and of very many rows, the blocks are as fast
        return None
    examined, tensors = _examine(layers)
    stack = examined.stack
    if stack is None or any(examined.hooks) or not are_plain([hidden, *tensors]):
        return None
    many = prefill.chosen(stack) if length > 1 else None
    if length > 1 and many is None:
        return None
    shapes = stack.state_shapes(batch)
    before = _addresses(states, examined, shapes)
    if before is None:
        return None
    if want_gradient([hidden, *tensors]):
        return None if many is None else _recorded(layers, hidden, states, many)
    conv = torch.empty((len(layers), *shapes[0]), dtype=examined.narrow)
    ssm = torch.from_numpy(stack.memory.take(len(layers), shapes[1]))
    places = stepping.States(before[0::2], before[1::2]), stepping.States(_places(conv), _places(ssm))
    threads = torch.get_num_threads()
    if many is None:
        out = stack.advance(hidden.detach()[:, 0].float().numpy(), *places, threads)[:, None]
    else:
        out = prefill.read(many, hidden.detach().float().numpy(), *places, threads)
    after = tuple(map(LayerState, conv.unbind(), ssm.unbind()))
    tensors = list(chain.from_iterable(after))
    examined.latest = list(map(ref, tensors)), list(map(Tensor.data_ptr, tensors))
    return torch.from_numpy(out).to(torch.float32 if examined.wide else hidden.dtype), after


def _recorded(
    layers: Sequence[Any], hidden: Tensor, states: Sequence[LayerState], stack: Stack
) -> tuple[Tensor, tuple[LayerState, ...]] | None:
    """As :func:`decode_step` of many, for the gradient; None for other values than float32, and L below K-1."""
    length = hidden.shape[1]
    kinds = {matrix.kind for block in stack.blocks for matrix in (block.in_proj, block.x_proj, block.out_proj)}
    if length < stack.sizes.width - 1 or hidden.dtype != torch.float32 or kinds != {"float32"}:
        return None
    from mambax_torch import block_ops

    after = []
    for block, state in zip(layers, states, strict=True):
        hidden, state = block_ops.run(block, hidden, state)
        after.append(state)
    return hidden, tuple(after)


def _watched(hidden: Tensor) -> bool:
    """Whether the values are not the kernels', or someone is to see or change what is computed."""
    if hidden.device.type != "cpu" or hidden.dtype not in _NAMES or torch.is_autocast_enabled("cpu"):
        return True
    if torch._C._len_torch_function_stack() or any_global_hook():
        return True
    return bool(why_not_cpu_kernels(hidden))


def _addresses(
    states: Sequence[LayerState], examined: _Examined, shapes: Sequence[tuple[int, ...]]
) -> list[int] | None:
    """Where states lie, (conv, ssm) after (conv, ssm); None when one is not as the kernels take it: of these two
    shapes, contiguous."""
    tensors = list(chain.from_iterable(states))
    addresses = list(map(Tensor.data_ptr, tensors))
    references, latest = examined.latest
    known = addresses == latest and all(map(is_, tensors, [reference() for reference in references]))
    if not known:
        forms = (shapes[0], examined.narrow), (shapes[1], torch.float32)
        for i, tensor in enumerate(tensors):
            if type(tensor) is not Tensor or (tensor.shape, tensor.dtype) != forms[i % 2]:
                return None
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    return addresses


def _places(tensor: Tensor) -> list[int]:
    """Where the parts of a tensor along its first axis lie."""
    size = tensor.stride(0) * tensor.element_size()
    return [tensor.data_ptr() + size * i for i in range(len(tensor))]


# --- what a stack is -----------------------------------------------------------------------------------------


def _examine(layers: Sequence[Any]) -> tuple[_Examined, list[Tensor]]:
    """What a stack is, from the first time if nothing has changed; and its tensors."""
    found = _examined.get(layers[0])
    tensors = None if found is None else found.tensors_if_same(layers)
    if found is None or tensors is None:
        found = _examined[layers[0]] = _find_out(layers)
        tensors = found.tensors_if_same(layers) or []
    return found, tensors


def _find_out(layers: Sequence[Any]) -> _Examined:
    from mambax_cpu.stacks import stack_of

    blocks = list(layers)
    parents = [parent for block in blocks for parent in (block, *block.children()) if parent._modules]
    children = [child for parent in parents for child in parent._modules.values()]
    modules = [module for module in (*blocks, *children) if module is not None]
    attributes = [vars(module) for module in modules]
    holders = [held for module in modules for held in (module._parameters, module._buffers)]
    held = [tensor for holder in holders for tensor in holder.values()]
    stack = stack_of(blocks, _classes(), _OWN, _Given)
    named: list[tuple[Mapping[str, Any], str]] = [
        (values, name)
        for values in map(vars, (*blocks, *(child for block in blocks for child in block.children())))
        for name in values
        if name[0] != "_" and name != "training"
    ]
    return _Examined(
        stack=stack,
        narrow=blocks[0].norm.weight.dtype if stack is not None else torch.float32,
        wide=stack is not None and blocks[0].residual_in_fp32,
        blocks=[ref(block) for block in blocks],
        children=([parent._modules for parent in parents], children),
        classes=[type(module) for module in (*blocks, *children)],
        attributes=(attributes, [len(values) for values in attributes]),
        settings=(named, [values[name] for values, name in named]),
        forwards=_classes().forwards(),
        hooks=[getattr(module, name) for module in modules for name in HOOKS],
        tensors=(holders, [_nothing if tensor is None else ref(tensor) for tensor in held]),
        addresses=[tensor.data_ptr() for tensor in held if tensor is not None],
    )


def _nothing() -> None:
    """In the place of a reference to a tensor where there is none."""


class _Given:
    """See :class:`mambax_cpu.stacks.Given`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.narrow, self.fit = dtype, _NAMES.get(dtype, ""), dtype in _NAMES

    def vector(self, array: Tensor | None, shape: tuple[int, ...], *, wide: bool = False) -> int:
        """The address of a contiguous tensor of a shape and dtype; 0 for None."""
        if array is None:
            return 0
        plain = type(array) in (Tensor, torch.nn.Parameter) and array.device.type == "cpu"
        if not plain or array.shape != shape or array.dtype != (torch.float32 if wide else self.dtype):
            self.fit = False
            return 0
        self.fit &= array.is_contiguous()
        return array.data_ptr()

    def matrix(self, layer: Any, shape: tuple[int, int]) -> Any:
        """The weight of a linear layer."""
        from mambax_cpu.chain import Weights

        from mambax_torch.linear_ops import _weights as quantized

        if isinstance(layer, Linear):
            return Weights(self.narrow, *shape, self.vector(layer.weight, shape))
        for tensor in (layer.weight, layer.scales):
            plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
            self.fit &= plain and (layer.out_features, layer.in_features) == shape
        return quantized(layer.weight, layer.scales, layer.in_features)
