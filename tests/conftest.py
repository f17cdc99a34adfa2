"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from typing import Any

import pytest
from harness import backend_params

from mambax import get_backend
from mambax.registry import is_installed

if is_installed("torch"):
    import torch

    if not torch.cuda.is_available():  # before anything imports Triton, which reads this once
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=backend_params())
def nn(request: pytest.FixtureRequest) -> Any:
    """Each backend in turn."""
    return get_backend(request.param)
