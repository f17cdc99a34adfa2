"""Attention, in MLX."""

from __future__ import annotations

import mlx.core as mx


def attention(q: mx.array, k: mx.array, v: mx.array, visible: mx.array, scale: float) -> mx.array:
    """:func:`mambax.attention.attention`, by MLX's fused kernels."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible[:, None])
