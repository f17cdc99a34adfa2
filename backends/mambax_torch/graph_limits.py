"""Which steps a CUDA graph can hold, and for how long one serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from mambax import attention, experts, official, shared_blocks, sigmoid_experts
from mambax.sampling import SamplingParams
from mambax_torch import ops
from mambax_torch.layers import any_global_hook

_OWN = ("mambax_torch.", "torch.nn.modules.")
"""Where the classes of modules are that do the same every time."""

_GROWING = (attention.AttentionMixer, official.MHAMixer, shared_blocks.SharedAttention)
_CHOOSING = (experts.MoEMixer, experts.FusedExperts, sigmoid_experts.SigmoidMoEMixer)


def why_not_graph(model: torch.nn.Module, like: Tensor) -> str:
    """Why the steps of a model, from a state on the device of `like`, are not captured; empty when they are."""
    if like.device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the state is on {like.device}"
    if torch.version.hip is not None:
        return "PyTorch was built for AMD GPUs, where this was never tried"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "something else is being compiled or captured"
    return _why_not_here() or why_not_model(model, like.device)


def _why_not_here() -> str:
    """What is going on that a replayed step would pass by."""
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which keeps copies of weights for as long as it lasts"
    if any_global_hook():
        return "there are hooks for every module, which a graph would not call"
    if any_mode():
        return "a mode of PyTorch is on that sees every operation"
    if ops.inside_transform():
        return "a transform of torch.func, or forward-mode differentiation, is at work"
    return ""


def any_mode() -> bool:
    """Whether a mode of PyTorch is on that sees every operation; ``torch.set_default_device`` does no more than say
    where new tensors are to be."""
    modes = torch.overrides._get_current_function_mode_stack()
    return bool(torch._C._len_torch_dispatch_stack()) or not all(isinstance(m, DeviceContext) for m in modes)


def why_not_model(model: torch.nn.Module, device: torch.device) -> str:
    """Why the steps of a model on this device cannot be captured, whatever the device is; empty when they can."""
    for path, module in model.named_modules():
        if reason := _why_not_module(module):
            return f"{path or 'the model'} {reason}"
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            return f"{path} is on {tensor.device} and the state on {device}"
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{path} is a {type(tensor).__name__}, which need not have memory of its own"
    return ""


def _why_not_module(module: torch.nn.Module) -> str:
    kind = type(module)
    if isinstance(module, _GROWING):
        return "is attention, whose keys and values grow with every token"
    if isinstance(module, _CHOOSING):
        return "is a mixture of experts, of which a graph would compute all for every token"
    if not kind.__module__.startswith(_OWN):
        return f"is a {kind.__qualname__}, which may do what a graph cannot repeat"
    forward = getattr(kind.forward, "__module__", "")
    if "forward" in vars(module) or forward.partition(".")[0] not in ("mambax", "mambax_torch", "torch"):
        return "has a forward of its user's, which may do what a graph cannot repeat"
    if module._compiled_call_impl is not None:
        return "is compiled, and may be captured already"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a graph would not call"
    return ""


class Layout(NamedTuple):
    """What a captured step depends on: it serves as long as all of it is the same.

    Attributes:
        arrays: of the state, names, shapes, dtypes and devices.
        params: how tokens are chosen.
        weights: where they lie, and how.
        modules: their classes and settings.
        products: how PyTorch multiplies.
    """

    arrays: tuple[Any, ...]
    params: SamplingParams
    weights: tuple[Any, ...]
    modules: tuple[Any, ...]
    products: tuple[Any, ...]


def layout_of(model: torch.nn.Module, params: SamplingParams, state: Any) -> Layout:
    """The layout of the steps of a model from states such as this one."""
    arrays = tuple((name, tuple(a.shape), a.dtype, a.device) for name, a in state.arrays().items())
    weights = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors_of(model))
    modules = tuple((type(module), *_settings(module)) for module in model.modules())
    matmul = torch.backends.cuda.matmul
    # how PyTorch 2.9 and newer say it, where asking in the old way can raise
    precision = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32
    products = (
        precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
    return Layout(arrays, params, weights, modules, products)


def tensors_of(model: torch.nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def _settings(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a module was told, beside its weights: numbers, texts, dtypes, and mambax's configurations."""
    plain, own = (bool, int, float, str, torch.dtype, type(None)), ("mambax.config", "mambax.options")
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if name[0] != "_" and (isinstance(value, plain) or type(value).__module__ in own)
    )
