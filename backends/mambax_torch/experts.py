"""Mixtures of experts, in PyTorch: an expert computes the tokens that chose it, and no others.

Dimensions: M d_model, E experts, K experts of a token, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambax import experts as definition
from mambax_torch import ops
from mambax_torch.layers import _linear as linear


def mixture(
    parts: definition.Parts, formula: definition.Formula, x: Tensor, chosen: Tensor, ratings: Tensor
) -> Tensor:
    """:func:`mambax.experts.mixture`. Inside a graph that is compiled or captured, which cannot depend on the
    choice, every expert computes every token."""
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return definition.mixture(ops, parts, formula, x, chosen, ratings)
    products = definition.products_of(ops, parts, lambda x, weight: linear(x, weight, None))
    tokens, count = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # of the T K pairs of a token and an expert, by the expert
    sizes = torch.bincount(flat, minlength=len(products)).tolist()
    rows = x[order // count].split(sizes)
    all_of_them = torch.is_grad_enabled()  # an expert that no token chose has a gradient too: zeros
    pieces = [formula(p, own) for p, own in zip(products, rows, strict=True) if all_of_them or len(own)]
    if not pieces:  # there are no tokens
        return torch.zeros_like(x)
    done = torch.cat(pieces)[order.argsort()].view(tokens, count, -1)  # (T, K, M)
    return (done * ratings[..., None]).sum(1)
