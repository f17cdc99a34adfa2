"""One token through a stack of blocks on an NVIDIA GPU, where that means the same as calling the blocks.

Per block: the norm together with the addition of what the block before made, in_proj, two launches for all that
lies between (:mod:`mambax_torch.kernels.step_block`, and for Mamba-2 :mod:`mambax_torch.kernels.step_mamba2`),
out_proj. Blocks of both kinds may be mixed. In a CUDA graph the checks here cost nothing.

Dimensions: B batch, M d_model, D d_inner, N d_state, K d_conv; of Mamba-2 H heads, P head_dim, C channels of the
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambax.blocks import LayerState
from mambax_torch.graph_limits import any_mode
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
    return torch.is_grad_enabled() or any_mode() or any_global_hook()


def _is_ours(block: Any, hidden: Tensor) -> bool:
    """Whether a block is what mambax makes, all of it beside `hidden` and without hooks where kernels pass by."""
    from mambax_torch.models import Block, Mamba2Mixer, MambaMixer

    if type(block) is not Block or type(block.norm) is not RMSNorm or block.residual_multiplier != 1:
        return False
    mixer = block.mixer
    if type(mixer) is MambaMixer:
        found = _parts_of_mamba(mixer)
    elif type(mixer) is Mamba2Mixer:
        found = _parts_of_mamba2(mixer)
    else:
        return False
    if found is None or mixer.config.scan not in ("auto", "triton"):
        return False
    modules, tensors = found
    passed = (block, mixer, block.norm, *modules)
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in passed):
        return False
    return all(t is None or _is_taken(t, hidden.device) for t in (block.norm.weight, *tensors))


def _is_taken(weight: Any, device: torch.device) -> bool:
    """Whether a weight has its own memory, where and how the kernels read it."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device != device or not weight.is_contiguous():
        return False
    return weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


Parts = tuple[Sequence[Any], Sequence[Any]]
"""The modules of a mixer that the kernels pass by, and the weights that they read, some of which may be None."""


def _parts_of_mamba(mixer: Any) -> Parts | None:
    """None where the kernels cannot take the mixer."""
    conv, dt_proj = mixer.conv1d, mixer.dt_proj
    if mixer.config.dt_b_c_norm != "none" or type(conv) is not CausalConv1d or type(dt_proj) is not Linear:
        return None
    return (conv, dt_proj), (conv.weight, conv.bias, dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D)


def _parts_of_mamba2(mixer: Any) -> Parts | None:
    """None where the kernels cannot take the mixer."""
    from mambax_torch.kernels import step_mamba2

    conv, norms = mixer.conv1d, () if mixer.options.gated_norm == "none" else (mixer.norm,)
    if step_mamba2.why_not(mixer.options) or type(conv) is not CausalConv1d:
        return None
    if any(type(norm) is not RMSNorm for norm in norms):
        return None
    weights = (conv.weight, conv.bias, mixer.dt_bias, mixer.A_log, mixer.D, *(norm.weight for norm in norms))
    return (conv, *norms), weights


def _fits(block: Any, state: LayerState, hidden: Tensor) -> bool:
    """Whether the states are those of this batch and of weights in one narrow dtype."""
    from mambax_torch.models import Mamba2Mixer

    mixer, batch, narrow = block.mixer, hidden.shape[0], block.norm.weight.dtype
    conv, ssm = state.conv, state.ssm
    if type(mixer) is Mamba2Mixer:
        options = mixer.options
        shapes = (
            (batch, options.d_conv - 1, options.conv_channels),
            (batch, options.n_heads, options.head_dim, options.d_state),
        )
    else:
        config = mixer.config
        shapes = (batch, config.d_conv - 1, config.d_inner), (batch, config.d_inner, config.d_state)
        if mixer.dt_proj.weight.dtype != narrow:
            return False
    if (tuple(conv.shape), tuple(ssm.shape)) != shapes or conv.dtype != narrow or ssm.dtype != torch.float32:
        return False
    if conv.device != hidden.device or ssm.device != hidden.device:
        return False
    return conv.is_contiguous() and ssm.is_contiguous()


def _mixer(mixer: Any, normed: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """What a mixer makes of one token, (B, M) to (B, M), and the state after it."""
    from mambax_torch.models import Mamba2Mixer

    return (_mamba2 if type(mixer) is Mamba2Mixer else _mamba)(mixer, normed, state)


def _mamba2(mixer: Any, normed: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """:func:`_mixer` of Mamba-2. Where in_proj gives another dtype than the state's, the mixer itself goes on."""
    from mambax_torch.kernels import step_mamba2
    from mambax_torch.kernels.step_targets import target_of

    projected = mixer.in_proj(normed)
    if projected.dtype != state.conv.dtype:
        y, after = mixer.mix(projected[:, None], state, None, None)
        return mixer.out_proj(y[:, 0]), after
    conv = target_of(state.conv)
    if conv is not None and conv.data_ptr() == state.conv.data_ptr():  # which several programs read
        conv = None
    after = LayerState(_room(conv, state.conv), _room(target_of(state.ssm), state.ssm))
    y = step_mamba2.mixed(
        mixer.options, projected, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D,
        None if mixer.options.gated_norm == "none" else mixer.norm.weight,
        (state.conv, state.ssm), (after.conv, after.ssm),
    )  # fmt: skip
    return mixer.out_proj(y), after


def _mamba(mixer: Any, normed: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """:func:`_mixer` of Mamba-1."""
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
