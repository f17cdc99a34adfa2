"""Fixtures of the whole suite."""

from __future__ import annotations

from typing import Any

import pytest
from harness import backend_params

from mambax import get_backend


@pytest.fixture(params=backend_params())
def nn(request: pytest.FixtureRequest) -> Any:
    """Each backend in turn."""
    return get_backend(request.param)
