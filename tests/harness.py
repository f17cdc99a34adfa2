"""What the numerical tests share: backends, models with known weights, and their results as NumPy arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from tolerances import assert_close

from mambax import MambaLMConfig, get_backend
from mambax.registry import is_installed

BACKENDS = ("numpy", "torch", "mlx")
WITH_GRADIENTS = ("torch", "mlx")
FLOAT32_ALWAYS = (".A_log", ".D", ".dt_proj.bias")
"""Parameters that stay in float32 when the others are narrower."""

TORCH = pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
MLX = pytest.mark.skipif(not is_installed("mlx"), reason="mlx is not installed")
"""For tests that need one framework."""

TORCH_COMPILES = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
"""For tests that start torch's compiler, which uses what torch itself deprecates."""


def backend_params(names: tuple[str, ...] = BACKENDS) -> list[Any]:
    """The names as test parameters; those whose framework is missing are skipped."""
    missing = pytest.mark.skip(reason="its framework is not installed")
    return [name if is_installed(name) else pytest.param(name, marks=missing) for name in names]


def installed(names: tuple[str, ...] = BACKENDS) -> list[str]:
    """The names whose framework is there."""
    return [name for name in names if is_installed(name)]


def scan_params(names: tuple[str, ...] = BACKENDS, *, gpu: bool = False) -> list[Any]:
    """(backend, implementation) for every scan implementation that runs here, and "auto".

    "triton" for tests that put arrays where :func:`device_of` says, and where there is a GPU or the machine of
    tests/ptx: the interpreter takes a hundred times as long, and test_triton_scan.py runs the tests it can take.
    """
    return [
        (name, impl)
        for name in names
        if is_installed(name)
        for impl in ("auto", *(i for i, reason in get_backend(name).scan_implementations().items() if not reason))
        if impl != "triton" or (gpu and _runs_compiled())
    ]


def _runs_compiled() -> bool:
    """Whether Triton's kernels run as compiled: on a GPU, or on the machine in its place."""
    import torch
    from mambax_torch.kernels import devices

    return torch.cuda.is_available() or (devices.takes("cpu") and not devices.interpreted())


def device_of(impl: str) -> str | None:
    """Where arrays have to be for an implementation of the scan, as `from_numpy` takes it."""
    if impl != "triton":
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def config_of(**changes: Any) -> MambaLMConfig:
    """A small configuration of odd sizes: nothing is a power of two, a multiple of another, or a default."""
    fields: dict[str, Any] = {
        "d_model": 40, "n_layer": 3, "d_state": 8, "d_conv": 3, "dt_rank": 5, "vocab_size": 101,
        "use_bias": True, "tie_embeddings": False,
    }  # fmt: skip
    return MambaLMConfig(**(fields | changes))


def weights_of(config: MambaLMConfig, seed: int = 0) -> reference.Weights:
    """Random float64 weights for a configuration."""
    names = "d_model n_layer vocab_size d_inner d_state d_conv dt_rank use_bias use_conv_bias tie_embeddings"
    return reference.random_weights(**{name: getattr(config, name) for name in names.split()}, seed=seed)


def rounded(weights: reference.Weights, dtype: str) -> dict[str, np.ndarray]:
    """The weights in a dtype, those of FLOAT32_ALWAYS in float32 at least."""
    narrow = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    wide = narrow if dtype == "float64" else np.dtype(np.float32)
    return {
        name: array.astype(wide if name.endswith(FLOAT32_ALWAYS) else narrow) for name, array in weights.items()
    }


def assign(nn: Any, model: Any, values: dict[str, np.ndarray]) -> Any:
    """Put values, which must be exactly the model's parameters, into a model."""
    held = {name: tuple(array.shape) for name, array in nn.parameters(model).items()}
    assert held == {name: array.shape for name, array in values.items()}
    nn.set_parameters(model, {name: nn.from_numpy(array.copy()) for name, array in values.items()})
    return model


def build(nn: Any, config: MambaLMConfig, weights: reference.Weights | None = None, dtype: str = "float32") -> Any:
    """A causal language model with known weights."""
    weights = weights_of(config) if weights is None else weights
    return assign(nn, nn.MambaForCausalLM(config), rounded(weights, dtype))


def run(model: Any, ids: Any, state: Any = None, mask: Any = None, **options: Any) -> tuple[np.ndarray, Any]:
    """Logits as a NumPy array, and the state after."""
    with model.nn.no_grad():
        output = model(ids, state, mask, **options)
    return model.nn.to_numpy(output.logits), output.state


def state_arrays(state: Any) -> dict[str, np.ndarray]:
    """The arrays of a state as NumPy arrays, by name."""
    return {name: state.nn.to_numpy(array) for name, array in state.arrays().items()}


def token_ids(batch: int, length: int, vocab_size: int = 101, seed: int = 0) -> np.ndarray:
    """Random token ids (B, L)."""
    return np.random.default_rng(1000 * seed + length).integers(0, vocab_size, (batch, length))


def assert_states_close(got: Any, want: Any) -> None:
    """Two states, or a state's arrays, hold the same."""
    got, want = (s if isinstance(s, dict) else state_arrays(s) for s in (got, want))
    assert got.keys() == want.keys()
    np.testing.assert_array_equal(got["tokens_seen"], want["tokens_seen"])
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert_close(got[name], want[name], what=name)


def assert_states_equal(got: Any, want: Any) -> None:
    """Two states, or a state's arrays, hold exactly the same."""
    got, want = (s if isinstance(s, dict) else state_arrays(s) for s in (got, want))
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def frozen(state: Any) -> dict[str, np.ndarray]:
    """A copy of the arrays of a state that nothing can reach."""
    return {name: array.copy() for name, array in state_arrays(state).items()}


class Letters:
    """A tokenizer of 101 ids: 100 ends a text, 0 to 9 are half a letter until another comes, the rest a letter."""

    eos_token_ids = (100,)

    def __init__(self) -> None:
        self.half = 0
        self.asked: list[bool] = []  # of each stream, whether it carries on a text

    def encode(self, text: str) -> list[int]:
        return [10 + ord(letter) - ord("a") for letter in text]

    def stream(self, *, continues: bool = False) -> Letters:
        self.asked.append(continues)
        return type(self)()

    def add(self, token: int) -> str:
        if token < 10:
            self.half += 1
            return ""
        text, self.half = "é" * self.half + chr(ord("a") + (token - 10) % 26), 0
        return text

    def finish(self) -> str:
        text, self.half = "?" * self.half, 0
        return text


def letters(tokens: list[int]) -> str:
    """The whole text of some tokens."""
    stream = Letters().stream()
    return "".join(stream.add(token) for token in tokens) + stream.finish()
