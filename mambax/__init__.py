"""Mamba state-space models, defined once, on PyTorch, MLX and NumPy.

Importing this package imports no array framework but NumPy.
"""

from mambax.checkpoint import convert, load, save_pretrained
from mambax.config import BaseMambaConfig, MambaClassificationConfig, MambaConfig, MambaLMConfig
from mambax.construction import from_config
from mambax.conversation import Conversation
from mambax.generation import Generation, StreamEvent
from mambax.registry import backend_names, default_backend, get_backend
from mambax.state import InferenceParams
from mambax.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "BaseMambaConfig",
    "Conversation",
    "Generation",
    "InferenceParams",
    "MambaClassificationConfig",
    "MambaConfig",
    "MambaLMConfig",
    "StreamEvent",
    "Tokenizer",
    "backend_names",
    "convert",
    "default_backend",
    "from_config",
    "get_backend",
    "load",
    "save_pretrained",
]
