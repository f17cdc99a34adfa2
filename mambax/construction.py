"""Building a new model from a configuration."""

from __future__ import annotations

from typing import Any

from mambax.backend import Backend
from mambax.config import MambaClassificationConfig, MambaConfig, MambaLMConfig
from mambax.init import Initializer
from mambax.registry import choose_backend


def model_class(nn: Backend, config: MambaLMConfig) -> Any:
    """The model class of a backend that this configuration describes."""
    if isinstance(config, MambaClassificationConfig):
        return nn.MambaForSequenceClassification
    return nn.MambaForCausalLM


def from_config(config: MambaLMConfig, *, backend: str | None = None, seed: int = 0) -> Any:
    """A new model with initial weights, in float32 on the CPU (MLX: on its default device).

    Args:
        config: a :class:`MambaLMConfig` gives a causal language model, a
            :class:`MambaClassificationConfig` a sequence classifier.
        backend: name of a backend; the best installed one when None.
        seed: the same seed gives the same weights on every backend.

    Returns:
        The backend's model: a ``torch.nn.Module``, an ``mlx.nn.Module`` or a NumPy module.

    Raises:
        ValueError: for an unknown backend, and for a configuration that is neither of the two.
        ImportError: when its framework is missing, with the command that installs it.
    """
    if not isinstance(config, MambaLMConfig):
        hint = ", which has the vocabulary that a model needs" if isinstance(config, MambaConfig) else ""
        raise ValueError(
            f"config is of type {type(config).__name__}; expected a MambaLMConfig or a MambaClassificationConfig"
            f"{hint}"
        )
    nn = choose_backend(backend)
    return model_class(nn, config)(config, init=Initializer(seed))
