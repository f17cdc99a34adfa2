"""Structure: PyTorch's own modules, built from NumPy values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mambax.init import Initial, Placeholder
from mambax_torch import ops

Module = torch.nn.Module
ModuleList = torch.nn.ModuleList


def Parameter(value: Initial) -> torch.nn.Parameter:
    """A parameter from initial values. A placeholder stays on the meta device until it is set."""
    if isinstance(value, Placeholder):
        return torch.nn.Parameter(torch.empty(value.shape, device="meta"))
    return torch.nn.Parameter(ops.from_numpy(value))


def parameters(module: Module) -> dict[str, Tensor]:
    """Every parameter by dotted path; the arrays of quantised layers, which are buffers, among them."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def set_parameters(module: Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters by dotted path, without copying.

    Raises:
        KeyError: for a path that leads nowhere.
    """
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        try:
            parent = module.get_submodule(owner)
        except AttributeError as error:
            raise KeyError(path) from error
        if parent._buffers.get(name) is not None:
            setattr(parent, name, value.detach())
        elif parent._parameters.get(name) is not None:
            setattr(parent, name, torch.nn.Parameter(value.detach()))
        else:
            raise KeyError(path)
