"""States in files: portable between backends, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import BFLOAT16
from harness import backend_params, build, config_of, run, state_arrays, token_ids, weights_of
from tolerances import FORWARD, assert_close, relative_error

from mambax import InferenceParams, default_backend, get_backend
from mambax.checkpoint.safetensors_files import SafetensorsFile, write_safetensors
from mambax.checkpoint.tensors import TensorInfo

CONFIG = config_of()
IDS = token_ids(2, 16)


def saved(path: Path, nn: Any, dtype: str = "float32", **changes: Any) -> Any:
    """The state of a model that has read seven tokens of each row, and its file."""
    state = run(build(nn, config_of(**changes), dtype=dtype), IDS[:, :7])[1]
    state.save(path)
    return state


def rewrite(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a state file with other contents."""
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, infos, arrays.__getitem__, metadata or {"format": "mambax-state", "version": "1"})


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same names, dtypes and values."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("target", backend_params())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_moves_between_backends(nn: Any, target: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "text.state"
    state = saved(path, nn, dtype)
    loaded = InferenceParams.load(path, backend=target)
    assert type(loaded) is get_backend(target).InferenceParams
    assert_equal(state_arrays(loaded), state_arrays(state))

    model = build(get_backend(target), CONFIG, dtype=dtype)
    continued, _ = run(model, IDS[:, 7:], model.load_state(path))
    want, _ = run(model, IDS)
    # The state of another backend differs from one's own by rounding, in the dtype of the activations.
    assert_close(continued, want[:, 7:], dtype)
    forgotten, _ = run(model, IDS[:, 7:])
    assert relative_error(forgotten, want[:, 7:]) > FORWARD[dtype], "the comparison would not see a lost state"


def test_which_backend_a_state_is_loaded_on(nn: Any, tmp_path: Path) -> None:
    saved(tmp_path / "a.state", nn)
    assert type(nn.InferenceParams.load(tmp_path / "a.state")) is nn.InferenceParams
    assert type(InferenceParams.load(str(tmp_path / "a.state"))).nn.name == default_backend()
    assert type(nn.InferenceParams.load(tmp_path / "a.state", backend="numpy")).nn.name == "numpy"


@pytest.mark.parametrize("d_conv", [1, 2])
def test_short_convolutions(nn: Any, tmp_path: Path, d_conv: int) -> None:
    state = saved(tmp_path / "a.state", nn, d_conv=d_conv)
    model = build(nn, config_of(d_conv=d_conv))
    assert_equal(state_arrays(model.load_state(tmp_path / "a.state")), state_arrays(state))


def test_a_model_brings_a_state_to_its_dtypes(nn: Any, tmp_path: Path) -> None:
    saved(tmp_path / "a.state", get_backend("numpy"), "float64")
    assert SafetensorsFile(tmp_path / "a.state").tensors["layers.0.ssm_state"].dtype == np.float64
    for dtype, conv in (("float32", np.dtype(np.float32)), ("bfloat16", BFLOAT16)):
        arrays = state_arrays(build(nn, CONFIG, dtype=dtype).load_state(tmp_path / "a.state"))
        assert arrays["layers.0.conv_state"].dtype == conv
        assert arrays["layers.0.ssm_state"].dtype == np.float32
        assert arrays["tokens_seen"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_layer": 2}, r"2 x conv_state \[2, 80\]"),
        ({"d_conv": 4}, r"3 x conv_state \[3, 80\]"),
        ({"expand": 3}, r"conv_state \[2, 120\], 3 x ssm_state \[120, 8\]"),
        ({"d_state": 4}, r"ssm_state \[80, 4\]"),
    ],
)
def test_the_state_of_another_model(nn: Any, tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    saved(tmp_path / "a.state", get_backend("numpy"), **changes)
    needed = r"3 x conv_state \[2, 80\], 3 x ssm_state \[80, 8\]"
    with pytest.raises(ValueError, match=f"a state of .*{found}.*; this model needs {needed}"):
        build(nn, CONFIG).load_state(tmp_path / "a.state")


def without(name: str) -> Any:
    return lambda arrays: arrays.pop(name)


def replaced(name: str, value: Any) -> Any:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (without("tokens_seen"), "'tokens_seen' is missing or unexpected"),
        (without("layers.1.ssm_state"), "is missing or unexpected"),
        (replaced("more", np.zeros(2, np.float32)), "is missing or unexpected"),
        (lambda arrays: arrays.clear(), "is missing or unexpected"),
        (replaced("tokens_seen", np.zeros(3, np.int64)), "do not belong together"),
        (replaced("tokens_seen", np.zeros(2, np.float32)), "do not belong together"),
        (replaced("layers.0.conv_state", np.zeros((2, 2, 79), np.float32)), "do not belong together"),
        (replaced("layers.0.ssm_state", np.zeros((2, 80, 8), np.int32)), "do not belong together"),
        (replaced("layers.2.ssm_state", np.zeros((2, 80, 7), np.float32)), "as in layer 0"),
        (replaced("layers.2.ssm_state", np.full((2, 80, 8), np.nan, np.float32)), "layers.2.ssm_state has values"),
        (replaced("tokens_seen", np.full(2, -1, np.int64)), "tokens_seen has values"),
    ],
)
def test_files_that_are_not_states(tmp_path: Path, spoil: Any, fragment: str) -> None:
    path = tmp_path / "a.state"
    arrays = state_arrays(saved(path, get_backend("numpy")))
    spoil(arrays)
    rewrite(path, arrays)
    with pytest.raises(ValueError, match=fragment):
        InferenceParams.load(path, backend="numpy")


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    with pytest.raises(FileNotFoundError, match=r"no such file; expected a state written by state.save\(path\)"):
        InferenceParams.load(path, backend="numpy")
    arrays = state_arrays(saved(path, get_backend("numpy")))
    content = path.read_bytes()
    rewrite(path, arrays, {"format": "pt"})
    with pytest.raises(ValueError, match="not a state of mambax"):
        InferenceParams.load(path, backend="numpy")
    rewrite(path, arrays, {"format": "mambax-state", "version": "2"})
    with pytest.raises(ValueError, match="state format '2'; this mambax reads '1'"):
        InferenceParams.load(path, backend="numpy")
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        InferenceParams.load(path, backend="numpy")


def test_a_save_that_fails_leaves_the_older_state(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    state = saved(path, get_backend("numpy"))
    before = path.read_bytes()
    state.layers[1].ssm[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"layers.1.ssm_state of the state has values that are NaN or infinite"):
        state.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]


def test_a_state_saved_after_generating_continues_the_text(nn: Any, tmp_path: Path) -> None:
    model = build(nn, CONFIG, weights_of(CONFIG))
    prompt = IDS[0].tolist()
    whole = model.generate(prompt, max_new_tokens=20, eos=()).tokens
    first = model.generate(prompt, max_new_tokens=8, eos=())
    assert first.tokens == whole[:8]
    first.state.save(tmp_path / "a.state")
    seen = int(state_arrays(first.state)["tokens_seen"][0])
    rest = (prompt + whole)[seen : len(prompt) + 9]  # what the state has not read, up to the ninth token
    again = model.generate(rest, max_new_tokens=11, eos=(), state=model.load_state(tmp_path / "a.state"))
    assert again.tokens == whole[9:]
