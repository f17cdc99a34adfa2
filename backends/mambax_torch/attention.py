"""Attention, in PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """:func:`mambax.attention.attention`, by PyTorch's fused kernels."""
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
