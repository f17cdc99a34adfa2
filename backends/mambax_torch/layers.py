"""Layers as PyTorch modules, with the parameter names and shapes of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambax.init import Initial
from mambax.scan import at_least_float32
from mambax_torch import ops
from mambax_torch.fused import causal_conv1d
from mambax_torch.module import Module, Parameter


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
            return F.linear(input, self.weight, bias)
        return F.linear(input, self.weight).to(bias.dtype) + bias


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
        return F.linear(x, self.weight)


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

    def forward(self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, D) to (B, L, D) and the last K-1 inputs; see :func:`mambax.convolution.causal_conv1d`."""
        return causal_conv1d(x, self.weight, self.bias, initial_state=state, mask=mask)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, bias={self.bias is not None}"
