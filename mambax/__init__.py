"""Mamba state-space models, defined once, on PyTorch, MLX and NumPy.

Importing this package imports no array framework but NumPy.
"""

from mambax.config import BaseMambaConfig, MambaClassificationConfig, MambaConfig, MambaLMConfig
from mambax.construction import from_config
from mambax.generation import Generation, StreamEvent
from mambax.registry import backend_names, default_backend, get_backend
from mambax.state import InferenceParams

__version__ = "0.1.0"

__all__ = [
    "BaseMambaConfig",
    "Generation",
    "InferenceParams",
    "MambaClassificationConfig",
    "MambaConfig",
    "MambaLMConfig",
    "StreamEvent",
    "backend_names",
    "default_backend",
    "from_config",
    "get_backend",
]
