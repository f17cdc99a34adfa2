"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
from harness import backend_params

from mambax import get_backend
from mambax.registry import is_installed

if is_installed("torch"):
    import torch

    if not torch.cuda.is_available():  # before anything imports Triton, which reads this once
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", action="store_true", help="run Triton's kernels as compiled for a GPU (tests/ptx)")
    parser.addoption("--capability", default="9.0", help="of the GPU that --ptx compiles for; 9.0 is an H100")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ptx"):
        if not all(map(find_spec, ("torch", "triton"))):
            raise pytest.UsageError("--ptx needs PyTorch and Triton; pip install torch triton")
        if torch.cuda.is_available():
            raise pytest.UsageError("--ptx is for machines without a GPU, which runs the compiled kernels itself")
        os.environ["TRITON_INTERPRET"] = "0"
        from ptx.driver import install

        major, minor = map(int, config.getoption("--capability").split("."))
        install((major, minor))


@pytest.fixture(params=backend_params())
def nn(request: pytest.FixtureRequest) -> Any:
    """Each backend in turn."""
    return get_backend(request.param)
