"""Layers as PyTorch modules, with the parameter names and shapes of Hugging Face checkpoints."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from mambax.init import Initial
from mambax.scan import at_least_float32
from mambax_torch import normed_ops, ops
from mambax_torch.fused import causal_conv1d, why_not_cpu_kernels
from mambax_torch.kernels.devices import why_not_triton
from mambax_torch.module import Module, Parameter

FEW_ROWS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 32}
"""Rows up to which the kernels of mambax_cpu are faster than PyTorch's product; see :mod:`mambax_cpu.linear`."""

_SMALL = 1 << 15
"""Weights below which the product is too short for that to matter."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Of a module: what PyTorch calls with its inputs, outputs and gradients, which kernels keep to themselves."""

_LARGE_NORM = 1 << 14
"""Values from which on the kernel of RMSNorm is faster than PyTorch's operations one by one."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias. In host memory: by the kernels of mambax_cpu for few rows where no gradient is wanted, for
    many by the fastest product of this machine. Elsewhere: for the gradient, what a norm gave is not kept."""
    if not _in_host_memory(x, weight):
        product = normed_ops.linear(x, weight, bias)
        return F.linear(x, weight, bias) if product is None else product
    if _few_rows(x, weight, bias):
        from mambax_torch import linear_ops

        return linear_ops.linear(x, weight, bias)
    from mambax_torch import product_ops

    large = x.numel() * weight.shape[0] >= product_ops.LARGE
    return (product_ops.product if large else F.linear)(x, weight, bias)


def _in_host_memory(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a choice: plain tensors of one float dtype up to float32 on the CPU."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1]:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return _plain(weight) and not why_not_cpu_kernels(x)


def _plain(weight: Tensor) -> bool:
    """Whether this is a tensor with memory of its own, of a dtype of the kernels."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in FEW_ROWS


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels are to be used."""
    if weight.numel() < _SMALL or x.numel() > FEW_ROWS[weight.dtype] * x.shape[-1]:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))


class Linear(torch.nn.Linear):
    """x (..., in) -> x weight^T + bias (..., out).

    Args:
        weight: (out, in).
        bias: (out,) or None. A float32 bias over narrower weights makes the output float32.
    """

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = Parameter(weight)
        self.register_parameter("bias", None if bias is None else Parameter(bias))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        bias = self.bias
        if bias is None or bias.dtype == self.weight.dtype:
            return _linear(input, self.weight, bias)
        return _linear(input, self.weight, None).to(bias.dtype) + bias


_FORWARD = Linear.forward


def time_steps(dt_proj: Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """See :meth:`mambax.backend.Backend.time_steps`. Under autocast the bias is left for the scan to add.

    The bias is several times larger than what the product gives, and their sum goes through an exponential: rounded
    to bfloat16, it makes time steps wrong by up to a sixtieth. In what ``torch.compile`` traces it still does.
    """
    if torch.is_autocast_enabled(dt.device.type) and is_plain_linear(dt_proj):
        return _linear(dt, dt_proj.weight, None), dt_proj.bias
    return dt_proj(dt), None


def is_plain_linear(layer: Module) -> TypeGuard[Linear]:
    """Whether calling a layer runs :class:`Linear` and nothing else."""
    return type(layer) is Linear and _runs(layer, _FORWARD)


def is_plain_conv(layer: Module) -> TypeGuard[CausalConv1d]:
    """Whether calling a layer runs :class:`CausalConv1d` and nothing else."""
    return type(layer) is CausalConv1d and _runs(layer, _CONV_FORWARD)


def _runs(layer: Module, forward: object) -> bool:
    """Whether calling a layer runs this function as its ``forward``, and no hook."""
    if getattr(layer.forward, "__func__", None) is not forward:
        return False
    return not any_global_hook() and not any(getattr(layer, name) for name in HOOKS)


def any_global_hook() -> bool:
    """Whether PyTorch calls something with the inputs, outputs or gradients of every module."""
    return any(getattr(torch_module, f"_global{name}") for name in HOOKS)  # which is how PyTorch itself asks


class Embedding(torch.nn.Embedding):
    """A table (V, D) of vectors.

    Args:
        weight: (V, D).
    """

    def __init__(self, weight: Initial) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, _weight=Parameter(weight))

    def as_linear(self, x: Tensor) -> Tensor:
        """x (..., D) to scores (..., V): the table as the weight of a tied head."""
        return _linear(x, self.weight, None)


class RMSNorm(Module):
    """x / rms(x) * weight, statistics in float32, output in the dtype of the weight.

    Args:
        weight: (D,).
        eps: added to the mean square.
    """

    def __init__(self, weight: Initial, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x.is_cuda and not why_not_triton(x):
            from mambax_torch.kernels import norm

            y, _ = norm.rms_norm(x, self.weight, self.eps)
            return normed_ops.remember(y, x, self.weight, self.eps)
        if x.numel() >= _LARGE_NORM and _plain(self.weight) and not why_not_cpu_kernels(x):
            from mambax_torch import norm_ops

            return norm_ops.rms_norm(x, self.weight, self.eps)
        x = at_least_float32(ops, x)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * scale * at_least_float32(ops, self.weight)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class CausalConv1d(Module):
    """Causal depthwise convolution with SiLU.

    Args:
        weight: (D, 1, K).
        bias: (D,) or None.
    """

    bias: Tensor | None

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.register_parameter("bias", None if bias is None else Parameter(bias))

    def forward(
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, boundaries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) to (B, L, D) and the last K-1 inputs; see :func:`mambax.convolution.causal_conv1d`."""
        return causal_conv1d(x, self.weight, self.bias, initial_state=state, mask=mask, boundaries=boundaries)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, bias={self.bias is not None}"


_CONV_FORWARD = CausalConv1d.forward
