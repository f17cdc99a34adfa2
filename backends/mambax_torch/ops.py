"""The array functions and the host edge of the seam, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

__all__ = [
    "arange", "argmax", "argsort", "astype", "bool_", "compile", "concat", "cos", "cumulative_logsumexp",
    "cumulative_sum", "devices", "dtype", "evaluate", "exp", "float32", "float64", "from_numpy", "gelu", "int64",
    "log", "max", "maximum", "name", "no_grad", "silu", "sin", "softplus", "sort", "stack", "stop_gradient", "sum",
    "take_along_axis", "to_numpy", "unstack", "version", "where", "zeros",
]  # fmt: skip

name = "torch"
float32, float64, int64, bool_ = torch.float32, torch.float64, torch.int64, torch.bool


def version() -> str:
    """PyTorch's version."""
    return torch.__version__


def devices() -> Sequence[str]:
    """CUDA and MPS where they work, and the CPU."""
    found = ["cuda"] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    return (*found, "cpu")


def dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    return getattr(torch, name)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, *, like: Tensor) -> Tensor:
    """Zeros of a shape and dtype on the device of ``like``."""
    return torch.zeros(shape, dtype=dtype, device=like.device)


def arange(stop: int, *, like: Tensor) -> Tensor:
    """0 to stop - 1, int64, on the device of ``like``."""
    return torch.arange(stop, device=like.device)


def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype; x itself when it has it."""
    return x.to(dtype)


def concat(arrays: Sequence[Tensor], axis: int) -> Tensor:
    """Joined along an axis."""
    return torch.cat(list(arrays), axis)


def stack(arrays: Sequence[Tensor], axis: int) -> Tensor:
    """Joined along a new axis."""
    return torch.stack(list(arrays), axis)


def unstack(x: Tensor, axis: int) -> Sequence[Tensor]:
    """The slices along an axis."""
    return torch.unbind(x, axis)


def where(condition: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    """x where the condition holds, else y."""
    return torch.where(condition, x, y)


def take_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """x at indices along an axis."""
    return torch.take_along_dim(x, indices, axis)


def exp(x: Tensor) -> Tensor:
    """e to the x."""
    return torch.exp(x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm."""
    return torch.log(x)


def cos(x: Tensor) -> Tensor:
    """Cosine."""
    return torch.cos(x)


def sin(x: Tensor) -> Tensor:
    """Sine."""
    return torch.sin(x)


def maximum(x: Tensor, y: float) -> Tensor:
    """The larger of each element and y."""
    return torch.clamp(x, min=y)


def sum(x: Tensor, axis: int) -> Tensor:
    """Sum along an axis."""
    return torch.sum(x, axis)


def max(x: Tensor, axis: int) -> Tensor:
    """Largest along an axis; NaN if there is one."""
    return torch.from_numpy(np.max(x.numpy(), axis)) if _best_read_in_place(x) else torch.amax(x, axis)


def argmax(x: Tensor, axis: int) -> Tensor:
    """Index of the first largest along an axis."""
    return torch.from_numpy(np.argmax(x.numpy(), axis)) if _best_read_in_place(x) else torch.argmax(x, axis)


def _best_read_in_place(x: Tensor) -> bool:
    """Whether to let NumPy look through these values: logits in host memory, say.

    PyTorch's threads would share the work, which takes some microseconds, and then keep the processors busy for
    milliseconds waiting for more, while the kernels of the next token are at work.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in (float32, float64) or x.dim() < 2:
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if torch.jit.is_tracing() or inside_transform():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def inside_transform() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are at work: what is no operation of PyTorch
    would then be given wrapped tensors without memory, or lose the tangent."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def sort(x: Tensor, axis: int) -> Tensor:
    """Ascending."""
    return torch.sort(x, axis).values


def argsort(x: Tensor, axis: int) -> Tensor:
    """Indices that sort, ascending."""
    return torch.argsort(x, axis)


def cumulative_sum(x: Tensor, axis: int) -> Tensor:
    """Running sum along an axis."""
    return torch.cumsum(x, axis)


def cumulative_logsumexp(x: Tensor, axis: int) -> Tensor:
    """Running log of the sum of exponentials along an axis."""
    return torch.logcumsumexp(x, axis)


def stop_gradient(x: Tensor) -> Tensor:
    """x, from which no gradient flows back."""
    return x.detach()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); x itself above 20, where they are equal in float32 (above 40 in float64)."""
    return torch.nn.functional.softplus(x, threshold=40.0 if x.dtype == torch.float64 else 20.0)


def silu(x: Tensor) -> Tensor:
    """x times its logistic function."""
    return torch.nn.functional.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's function of x."""
    return torch.nn.functional.gelu(x)


def from_numpy(array: np.ndarray, *, like: Tensor | None = None, device: str | None = None) -> Tensor:
    """A tensor on the device of ``like``, or on ``device``, or on the CPU, where it shares memory if it can."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    where = like.device if like is not None else device
    return tensor if where is None else tensor.to(where)


def to_numpy(x: Tensor) -> np.ndarray:
    """An array in host memory; bfloat16 as ``ml_dtypes.bfloat16``."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def no_grad() -> AbstractContextManager[Any]:
    """Record nothing for gradients."""
    return torch.no_grad()


def evaluate(*arrays: Tensor, wait: bool = True) -> None:
    """PyTorch launches work as it is written; waiting synchronises the device."""
    if wait and arrays and arrays[0].device.type in ("cuda", "mps"):
        getattr(torch, arrays[0].device.type).synchronize()


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` without graph breaks."""
    return torch.compile(function, fullgraph=True)
