"""Loading checkpoints of both layouts on every backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import (
    as_torch,
    hf_config,
    save_safetensors,
    write_config,
    write_hf,
    write_original,
)
from harness import BACKENDS, build, config_of, rounded, run, token_ids, weights_of
from tolerances import FORWARD, assert_close, relative_error

import mambax
from mambax import MambaClassificationConfig, get_backend

DTYPES = ("float32", "float16", "bfloat16")
IDS = token_ids(2, 9)


def parameters(model: Any) -> dict[str, np.ndarray]:
    """The parameters of a model as NumPy arrays."""
    return {name: model.nn.to_numpy(array) for name, array in model.nn.parameters(model).items()}


def assert_same(model: Any, expected: dict[str, np.ndarray]) -> None:
    """The model has exactly these parameters, in these dtypes."""
    found = parameters(model)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "use_bias": False}], ids=["untied", "tied"])
def test_hugging_face_layout(nn: Any, tmp_path: Path, changes: dict[str, Any], shards: int, dtype: str) -> None:
    config = config_of(**changes)
    weights = weights_of(config)
    narrow = {name: array.astype(rounded({"": array}, dtype)[""].dtype) for name, array in weights.items()}
    model = mambax.load(write_hf(tmp_path, config, narrow, shards=shards), backend=nn.name)
    assert_same(model, rounded(narrow, dtype))
    assert (model.config.d_model, model.config.dt_rank, model.config.use_bias) == (40, 5, config.use_bias)
    want, _ = run(build(nn, config, narrow, dtype), IDS)
    assert_close(run(model, IDS)[0], want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("tied", [True, False])
def test_original_layout(nn: Any, tmp_path: Path, tied: bool, legacy: bool, dtype: str) -> None:
    config = config_of(vocab_size=104, tie_embeddings=tied)  # 101 padded to a multiple of 8
    narrow = {
        name: array.astype(rounded({"": array}, dtype)[""].dtype) for name, array in weights_of(config).items()
    }
    changes = {} if tied else {"tie_embeddings": False}
    folder = write_original(tmp_path, config, narrow, vocab_size=101, legacy=legacy, **changes)
    model = mambax.load(folder, backend=nn.name)
    assert model.config.vocab_size == 104
    assert_same(model, rounded(narrow, dtype))
    want, _ = run(build(nn, config, narrow, dtype), IDS)
    assert_close(run(model, IDS)[0], want, dtype)


def test_logits_equal_those_of_transformers(nn: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 101, "hidden_size": 40, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 3}
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=5)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS)).logits.numpy()
    model = mambax.load(tmp_path, backend=nn.name)
    assert_close(run(model, IDS)[0], want)
    planted = parameters(model)["backbone.layers.1.mixer.D"] * np.float32(1.001)
    nn.set_parameters(model, {"backbone.layers.1.mixer.D": nn.from_numpy(planted)})
    assert relative_error(run(model, IDS)[0], want) > FORWARD["float32"], "the comparison would not see an error"


@pytest.mark.parametrize("stored", ["backbone.embedding.weight", "backbone.embeddings.weight"])
def test_either_name_of_the_table_in_either_layout(tmp_path: Path, stored: str) -> None:
    config = config_of(tie_embeddings=True, vocab_size=104)
    expected = rounded(weights_of(config), "float32")
    renamed = {stored if "embeddings" in name else name: array for name, array in expected.items()}
    assert_same(mambax.load(write_hf(tmp_path / "hf", config, renamed), backend="numpy"), expected)
    folder = write_hf(tmp_path / "original", config, renamed)
    (folder / "config.json").unlink()
    ssm_cfg = {"d_state": 8, "d_conv": 3, "dt_rank": 5, "bias": True}
    write_config(folder, {"d_model": 40, "n_layer": 3, "vocab_size": 104, "ssm_cfg": ssm_cfg})
    assert_same(mambax.load(folder, backend="numpy"), expected)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    config = config_of(tie_embeddings=True)
    expected = rounded(weights_of(config), "float32")
    stored = expected | {"lm_head.weight": expected["backbone.embeddings.weight"]}
    assert_same(mambax.load(write_hf(tmp_path, config, stored), backend="numpy"), expected)


def test_convolution_weights_as_mlx_stores_them(tmp_path: Path) -> None:
    config = config_of()
    expected = rounded(weights_of(config), "float32")
    stored = {
        name: np.swapaxes(array, 1, 2) if name.endswith("conv1d.weight") else array
        for name, array in expected.items()
    }
    assert stored["backbone.layers.0.mixer.conv1d.weight"].shape == (80, 3, 1)
    assert_same(mambax.load(write_hf(tmp_path, config, stored), backend="numpy"), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_another_dtype_is_asked_for(nn: Any, tmp_path: Path, dtype: str) -> None:
    config = config_of()
    weights = rounded(weights_of(config), "float32")
    write_hf(tmp_path, config, weights)
    if nn.name == "mlx" and dtype == "float64":
        with pytest.raises(ValueError, match=r"float64 is not supported by the mlx backend; use float32"):
            mambax.load(tmp_path, backend="mlx", dtype=dtype)
        return
    assert_same(mambax.load(tmp_path, backend=nn.name, dtype=dtype), rounded(weights, dtype))


def test_mixed_dtypes_become_the_one_that_holds_them_all(tmp_path: Path) -> None:
    config = config_of()
    weights = rounded(weights_of(config), "bfloat16")
    norms = {name: array.astype(np.float32) for name, array in weights.items() if "norm" in name}
    model = mambax.load(write_hf(tmp_path, config, weights | norms), backend="numpy")
    assert {array.dtype.name for array in parameters(model).values()} == {"float32"}


def test_views_of_storages_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = config_of(tie_embeddings=True)
    expected = rounded(weights_of(config), "float32")
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in expected.values()]))
    state, at = {}, 0
    for name, array in expected.items():
        state[name] = flat[at : at + array.size].view(array.shape)  # all of them over one storage
        at += array.size
    name = "backbone.layers.1.mixer.x_proj.weight"
    state[name] = torch.nn.Parameter(as_torch(expected[name].T).T)  # not contiguous
    for legacy in (False, True):
        folder = write_config(tmp_path / str(legacy), hf_config(config))
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        model = mambax.load(folder, backend="torch")
        assert_same(model, expected)
        with torch.no_grad():
            model.backbone.norm_f.weight.fill_(0)  # no parameter shares memory with another one
        assert_same(model, expected | {"backbone.norm_f.weight": np.zeros(40, np.float32)})


def test_shards_of_bin_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = config_of()
    expected = rounded(weights_of(config), "float32")
    write_config(tmp_path, hf_config(config))
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(expected)}
    for shard in set(weight_map.values()):
        names = [name for name in expected if weight_map[name] == shard]
        torch.save({name: as_torch(expected[name]) for name in names}, tmp_path / shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    assert_same(mambax.load(tmp_path, backend="numpy"), expected)


def test_the_chosen_backend_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of()
    write_hf(tmp_path, config, rounded(weights_of(config), "float32"))
    model = mambax.load(tmp_path)
    assert model.nn.name == mambax.default_backend()
    assert f"using the {model.nn.name} backend on " in capfd.readouterr().err
    mambax.load(tmp_path, backend="numpy")
    assert capfd.readouterr().err == ""


def test_scan_and_progress(tmp_path: Path) -> None:
    config = config_of()
    weights = rounded(weights_of(config), "float32")
    calls: list[tuple[int, int]] = []
    write_hf(tmp_path, config, weights)
    model = mambax.load(
        tmp_path, backend="numpy", scan="pscan", progress=lambda done, total: calls.append((done, total))
    )
    assert model.config.scan == "pscan"
    total = sum(array.nbytes for array in weights.values())
    assert calls == sorted(calls)
    assert len(calls) == len(weights)
    assert calls[-1] == (total, total)
    with pytest.raises(ValueError, match="unknown scan implementation 'fast'; expected 'auto' or one of"):
        mambax.load(tmp_path, backend="numpy", scan="fast")


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'jax'; expected one of: .*numpy"):
        mambax.load(tmp_path, backend="jax")
    with pytest.raises(ValueError, match="device is 'tpu'; the numpy backend has 'cpu' here"):
        mambax.load(tmp_path, backend="numpy", device="tpu")
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of 'float32', 'float16'"):
        mambax.load(tmp_path, backend="numpy", dtype="int8")


@pytest.mark.parametrize("pooling", ["last", "mean", "state"])
def test_classifier(nn: Any, tmp_path: Path, pooling: Any) -> None:
    config = MambaClassificationConfig(d_model=8, n_layer=1, vocab_size=11, num_labels=3, pooling=pooling)
    model = nn.MambaForSequenceClassification(config)
    raw = hf_config(config, architectures=["MambaForSequenceClassification"], pooling=pooling, num_labels=3)
    write_config(tmp_path, raw | {"id2label": {"0": "a", "1": "b", "2": "c"}})
    save_safetensors(tmp_path / "model.safetensors", parameters(model))
    loaded = mambax.load(tmp_path, backend=nn.name)
    assert (loaded.config.num_labels, loaded.config.pooling) == (3, pooling)
    assert_close(nn.to_numpy(loaded(IDS % 11).logits), nn.to_numpy(model(IDS % 11).logits))


def test_base_model_of_transformers(nn: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 101, "hidden_size": 40, "state_size": 8, "num_hidden_layers": 2}
    theirs = transformers.MambaModel(transformers.MambaConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS)).last_hidden_state.mean(1).numpy()
    model = mambax.load(tmp_path, backend=nn.name)
    assert_close(nn.to_numpy(model(IDS).features), want)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import mambax
model = mambax.load(sys.argv[1], backend=sys.argv[2])
assert "transformers" not in sys.modules and "safetensors" not in sys.modules
print(model.generate([1, 2, 3], max_new_tokens=8).tokens)
"""


def test_an_original_checkpoint_loads_without_torch(tmp_path: Path) -> None:
    config = config_of(tie_embeddings=True, vocab_size=104)
    for dtype in ("float32", "bfloat16"):
        weights = rounded(weights_of(config), dtype)
        write_original(tmp_path / dtype, config, weights, vocab_size=104)
    expected = mambax.load(tmp_path / "float32", backend="torch").generate([1, 2, 3], max_new_tokens=8).tokens
    for backend in ("numpy", *(["mlx"] if mambax.registry.is_installed("mlx") else [])):
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(tmp_path / dtype), backend]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert dtype == "bfloat16" or done.stdout.strip() == str(expected)


PEAK_MEMORY = """
import sys
import numpy as np
import mambax

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

backend, warm_up, folder = sys.argv[1:]
nn = mambax.get_backend(backend)
mambax.load(warm_up, backend=backend)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
model = mambax.load(folder, backend=backend)
size = sum(array.nbytes for array in nn.parameters(model).values())
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure")
@pytest.mark.parametrize("kind", ["safetensors", "original"])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path, kind: str) -> None:
    """200 MB of weights, half of them in the table of embeddings: more than in any public Mamba model."""
    config = config_of(d_model=768, n_layer=6, vocab_size=32000, tie_embeddings=True)
    shapes = get_backend("numpy").parameters(get_backend("numpy").MambaForCausalLM(config))
    arrays = {name: np.zeros(array.shape, np.float32) for name, array in shapes.items()}
    folder, tiny = tmp_path / "large", tmp_path / "tiny"
    if kind == "original":
        write_original(folder, config, arrays, vocab_size=32000)
    else:
        write_hf(folder, config, arrays)
    write_hf(tiny, config_of(), rounded(weights_of(config_of()), "float32"))
    del arrays, shapes
    for backend in BACKENDS:
        if mambax.registry.is_installed(backend):
            command = [sys.executable, "-W", "error", "-c", PEAK_MEMORY, backend, str(tiny), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert 0.9 < float(done.stdout) < 1.2, f"{backend}: {done.stdout}"
