"""One token through a stack of blocks on an NVIDIA GPU, where that means the same as calling the blocks.

Per block: the norm together with the addition of what the block before made, in_proj, two launches for all that
lies between (:mod:`mambax_torch.kernels.step_block`), out_proj. In a CUDA graph the checks here cost nothing.

Dimensions: B batch, M d_model, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambax.blocks import LayerState
from mambax_torch.kernels.devices import why_not_triton
from mambax_torch.layers import CausalConv1d, Linear, RMSNorm, any_global_hook


def decode_step(
    layers: Sequence[Any], hidden: Tensor, states: Sequence[LayerState]
) -> tuple[Tensor, tuple[LayerState, ...]] | None:
    """See :meth:`mambax.backend.Backend.decode_step`: for a hidden state on a GPU, or in Triton's interpreter."""
    if torch.compiler.is_compiling() or hidden.shape[1] != 1 or not len(layers) or _watched(hidden):
        return None
    if not all(_is_ours(block, hidden) for block in layers):
        return None
    if not all(_fits(block, state, hidden) for block, state in zip(layers, states, strict=True)):
        return None
    from mambax_torch.kernels.norm import rms_norm

    stream, update, after = hidden[:, 0], None, []
    for block, state in zip(layers, states, strict=True):
        if update is None:
            normed, _ = rms_norm(stream, block.norm.weight, block.norm.eps)
        else:
            normed, stream = rms_norm(update, block.norm.weight, block.norm.eps, stream)
        update, state = _mixer(block.mixer, normed, state)
        if block.residual_in_fp32 and stream.dtype != torch.float32:
            stream = stream.float()
        after.append(state)
    assert update is not None
    return (stream + update.to(stream.dtype))[:, None], tuple(after)


def _watched(hidden: Tensor) -> bool:
    """Whether the values are not the kernels', or someone is to see or change what is computed."""
    if why_not_triton(hidden) or torch.is_autocast_enabled(hidden.device.type):
        return True
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return any_global_hook()


def _is_ours(block: Any, hidden: Tensor) -> bool:
    """Whether a block is what mambax makes, all of it beside `hidden` and without hooks where kernels pass by."""
    from mambax_torch.models import Block, MambaMixer

    if type(block) is not Block or type(block.mixer) is not MambaMixer or type(block.norm) is not RMSNorm:
        return False
    mixer = block.mixer
    if mixer.config.dt_b_c_norm != "none" or mixer.config.scan not in ("auto", "triton"):
        return False
    if block.residual_multiplier != 1:
        return False
    if type(mixer.conv1d) is not CausalConv1d or type(mixer.dt_proj) is not Linear:
        return False
    passed = (block, mixer, block.norm, mixer.conv1d, mixer.dt_proj)
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in passed):
        return False
    tensors = (
        block.norm.weight, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_proj.weight, mixer.dt_proj.bias,
        mixer.A_log, mixer.D,
    )  # fmt: skip
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and t.device == hidden.device and t.is_contiguous()) for t in tensors)


def _fits(block: Any, state: LayerState, hidden: Tensor) -> bool:
    """Whether the states are those of this batch and of weights in one narrow dtype."""
    mixer, batch = block.mixer, hidden.shape[0]
    config, narrow = mixer.config, block.norm.weight.dtype
    conv, ssm = state.conv, state.ssm
    shapes = (batch, config.d_conv - 1, config.d_inner), (batch, config.d_inner, config.d_state)
    if (tuple(conv.shape), tuple(ssm.shape)) != shapes or conv.dtype != narrow or ssm.dtype != torch.float32:
        return False
    if conv.device != hidden.device or ssm.device != hidden.device:
        return False
    return mixer.dt_proj.weight.dtype == narrow and conv.is_contiguous() and ssm.is_contiguous()


def _mixer(mixer: Any, normed: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """What a mixer makes of one token, (B, M) to (B, M), and the state after it."""
    from mambax_torch.kernels import step, step_block
    from mambax_torch.kernels.step_targets import target_of

    after = LayerState(*(_room(target_of(held), held) for held in state))
    xz = mixer.in_proj(normed)
    if xz.dtype == state.conv.dtype and len(xz) <= step_block.FEW_ROWS and _plain(mixer.x_proj, xz.dtype):
        y = step_block.mixed(
            xz, mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight, mixer.dt_proj.weight,
            mixer.dt_proj.bias, mixer.A_log, mixer.D, (state.conv, state.ssm), (after.conv, after.ssm),
        )  # fmt: skip
        return mixer.out_proj(y), after
    rank, count, channels = int(mixer.config.dt_rank), mixer.config.d_state, mixer.config.d_inner
    x = step.conv_step_into(xz[:, :channels], mixer.conv1d.weight, mixer.conv1d.bias, state.conv, after.conv)
    dbc = mixer.x_proj(x)
    dt, B, C = dbc.split([rank, count, count], 1)
    y = step.scan_step_into(
        x, torch.nn.functional.linear(dt, mixer.dt_proj.weight), mixer.A_log, B, C, mixer.D, xz[:, channels:],
        mixer.dt_proj.bias, True, state.ssm, after.ssm, A_is_log=True,
    )  # fmt: skip
    return mixer.out_proj(y), after


def _room(target: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty_like(like) if target is None else target


def _plain(x_proj: Any, dtype: torch.dtype) -> bool:
    """Whether x_proj is a matrix and nothing else."""
    if type(x_proj) is not Linear or x_proj.bias is not None or x_proj._forward_hooks or x_proj._forward_pre_hooks:
        return False
    weight = x_proj.weight
    return type(weight) is torch.nn.Parameter and weight.dtype == dtype and weight.is_contiguous()
