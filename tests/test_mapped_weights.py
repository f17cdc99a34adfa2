"""Weights used where they lie in a file: shared, never written through, and noticed when the file changes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_writers import write_hf, write_original
from harness import backend_params, config_of, rounded, weights_of

import mambax
from mambax.checkpoint import mapping, safetensors_files
from mambax.checkpoint.tensors import is_finite

pytestmark = pytest.mark.skipif(not mapping.AVAILABLE, reason="Windows lets nobody replace a file that is mapped")
IN_PLACE = pytest.mark.parametrize("backend", backend_params(("numpy", "torch")))
CONFIG = config_of()
WEIGHTS = weights_of(CONFIG)


def load(folder: Path, backend: str, **options: Any) -> Any:
    """On the CPU, which a torch with a GPU does not choose by itself."""
    return mambax.load(folder, backend=backend, device="cpu", **options)


def written(folder: Path, dtype: str = "float32") -> Path:
    return write_hf(folder, CONFIG, rounded(WEIGHTS, dtype))


def tokens(model: Any) -> list[int]:
    return model.generate([3, 4, 5], max_new_tokens=4, eos=()).tokens


def rewrite(path: Path, change: bool = True) -> None:
    """Write to a file in its place, as other programs do."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        end = file.read()
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4) if change else end)
    later = path.stat().st_mtime_ns + 10**9  # where clocks are coarse
    os.utime(path, ns=(later, later))


@IN_PLACE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_used_in_place(backend: str, dtype: str, tmp_path: Path) -> None:
    path = written(tmp_path, dtype) / "model.safetensors"
    before = path.read_bytes()
    model = load(tmp_path, backend)
    assert [file.path for file in model.mappings.files] == [path]
    arrays = {name: model.nn.to_numpy(array) for name, array in model.nn.parameters(model).items()}
    region = np.frombuffer(model.mappings.files[0]._map, np.uint8)
    for name, array in arrays.items():
        assert np.shares_memory(array, region), name
        array[...] = 1.0  # a model may be trained
    assert path.read_bytes() == before
    del region


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_what_needs_another_dtype_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    model = load(written(tmp_path), "numpy", **options)
    kept = {item.path for item in model.mappings.files}
    large = model.nn.parameters(model)["backbone.layers.0.mixer.in_proj.weight"]
    assert all(not np.shares_memory(large, np.frombuffer(f._map, np.uint8)) for f in model.mappings.files)
    assert kept == (set() if "quantize" in options else kept)


def test_files_of_pickles_are_read(tmp_path: Path) -> None:
    config = config_of(vocab_size=104, tie_embeddings=True, use_bias=False)
    folder = write_original(tmp_path, config, weights_of(config), vocab_size=101)
    assert load(folder, "numpy").mappings.files == ()


def test_where_files_cannot_be_mapped_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    want = tokens(load(folder, "numpy"))
    monkeypatch.setattr(safetensors_files, "AVAILABLE", False)
    windows = load(folder, "numpy")
    assert (windows.mappings.files, tokens(windows)) == ((), want)
    monkeypatch.undo()

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("no such file system")

    monkeypatch.setattr(mapping.mmap, "mmap", fail)
    elsewhere = load(folder, "numpy")
    assert (elsewhere.mappings.files, tokens(elsewhere)) == ((), want)


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    text = path.read_bytes()
    size = int.from_bytes(text[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + text[8 : 8 + size] + b" " + text[8 + size :])
    model = load(tmp_path, "numpy")
    assert model.mappings.files == ()
    np.testing.assert_array_equal(model.backbone.norm_f.weight, WEIGHTS["backbone.norm_f.weight"])
    assert model.backbone.norm_f.weight.flags.aligned


@IN_PLACE
def test_saving_to_where_it_came_from(backend: str, tmp_path: Path) -> None:
    model = load(written(tmp_path), backend)
    want = tokens(model)
    model.save_pretrained(tmp_path)
    assert tokens(model) == want
    model.save_pretrained(tmp_path, max_shard_size=20_000)  # other names: the old file goes
    assert tokens(model) == want == tokens(load(tmp_path, backend))
    assert len(load(tmp_path, backend).mappings.files) > 1


@IN_PLACE
@pytest.mark.parametrize("change", [True, False], ids=["other bytes", "the same bytes"])
def test_a_file_that_is_rewritten_in_place_is_noticed(backend: str, change: bool, tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    model = load(tmp_path, backend)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    want = tokens(model)
    rewrite(path, change)
    for use in (tokens, lambda model: model.save_pretrained(tmp_path / "new")):
        with pytest.raises(ValueError, match=r"model\.safetensors: the file was written to.*load the model again"):
            use(model)
    assert not (tmp_path / "new").exists()
    assert [tokens(other) for other in copies] == [want, want]
    assert tokens(load(tmp_path, backend))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    model = load(tmp_path, "numpy")
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="was written to"):
        tokens(model)


def test_a_file_that_is_replaced_lives_on(tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"
    model = load(tmp_path, "numpy")
    want = tokens(model)
    new = tmp_path / "new"
    new.write_bytes(b"something else")
    new.replace(path)
    assert tokens(model) == want
    path.unlink()
    assert tokens(model) == want


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changes_while_it_is_loaded(when: str, tmp_path: Path) -> None:
    path = written(tmp_path) / "model.safetensors"

    def progress(done: int, total: int) -> None:
        if when == "while":
            rewrite(path)

    if when == "before":  # between header and weights
        file = safetensors_files.SafetensorsFile(path)
        rewrite(path)
        with pytest.raises(ValueError, match="was written to"):
            file.view("backbone.norm_f.weight")
    else:
        with pytest.raises(ValueError, match="was written to"):
            load(tmp_path, "numpy", progress=progress)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped and open")
@IN_PLACE
def test_nothing_stays_open(backend: str, tmp_path: Path) -> None:
    model = load(written(tmp_path), backend)

    def uses() -> int:
        gc.collect()
        links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdecimal()
                 and os.path.lexists(f"/proc/self/fd/{n}")]  # fmt: skip
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return links.count(str(tmp_path / "model.safetensors")) + maps.count(str(tmp_path))

    assert uses() >= 2
    del model
    assert uses() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_what_is_not_finite_is_found(dtype: Any) -> None:
    array = np.random.default_rng(0).normal(size=2**19 // np.dtype(dtype).itemsize + 3).astype(dtype)
    array[:4] = [np.finfo(np.float16).max, -np.finfo(np.float16).max, 0.0, -0.0]
    assert is_finite(array)
    assert is_finite(array[:0])
    assert is_finite(array[:6].reshape(2, 3).T)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, len(array) // 2, len(array) - 1):
            kept, array[place] = array[place], value
            assert not is_finite(array)
            array[place] = kept
    largest = np.array(ml_dtypes.finfo(dtype).max, dtype)
    assert is_finite(np.array([largest, -largest]))


def test_greedy_generation_draws_no_numbers(tmp_path: Path) -> None:
    """NumPy's generators take megabytes and milliseconds to import."""
    from test_cpu_processes import python

    written(tmp_path)
    code = (
        f"import sys, mambax; model = mambax.load({str(tmp_path)!r}, backend='numpy')\n"
        "model.generate([3, 4], max_new_tokens=2, eos=())\n"
        "unwanted = ('numpy.random', 'hashlib', 'mambax_cpu.translation', 'torch')\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    python(code)  # which may have to compile, with all that this imports
    assert python(code) == "[]"
