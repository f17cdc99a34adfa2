"""Saving: what is written is read back, by transformers too, and a save that fails destroys nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import write_original
from harness import BACKENDS, build, config_of, rounded, run, token_ids, weights_of
from tolerances import FORWARD, assert_close, relative_error

import mambax
from mambax import MambaClassificationConfig, get_backend

IDS = token_ids(2, 9)
DTYPES = ("float32", "float16", "bfloat16")


def parameters(model: Any) -> dict[str, np.ndarray]:
    """The parameters of a model as NumPy arrays."""
    return {name: model.nn.to_numpy(array) for name, array in model.nn.parameters(model).items()}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same names, dtypes and values."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", [5 * 10**9, 20_000])
def test_round_trip_through_every_backend(nn: Any, tmp_path: Path, dtype: str, shard_size: int) -> None:
    model = build(nn, config_of(eos_token_id=(1, 2), pad_token_id=3), dtype=dtype)
    model.save_pretrained(tmp_path / "new" / "folder", max_shard_size=shard_size)
    folder = tmp_path / "new" / "folder"
    assert (folder / "model.safetensors.index.json").is_file() == (shard_size < 10**9)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    for backend in BACKENDS:
        if mambax.registry.is_installed(backend):
            again = mambax.load(folder, backend=backend)
            assert again.config == model.config
            assert_equal(parameters(again), parameters(model))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "use_conv_bias": False, "norm_epsilon": 1e-3}])
@pytest.mark.parametrize("shard_size", [5 * 10**9, 20_000])
def test_transformers_opens_it_and_agrees(
    nn: Any, tmp_path: Path, changes: dict[str, Any], shard_size: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build(nn, config_of(**changes))
    mambax.save_pretrained(model, tmp_path, max_shard_size=shard_size)
    theirs, report = transformers.MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(IDS)).logits.numpy()
        theirs.backbone.layers[1].mixer.D.mul_(1.001)
        planted = theirs(torch.from_numpy(IDS)).logits.numpy()
    assert_close(run(model, IDS)[0], want)
    assert relative_error(planted, want) > FORWARD["float32"], "the comparison would not see an error"


def test_transformers_agrees_in_bfloat16(nn: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build(nn, config_of(), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS)).logits.float().numpy()
    assert_close(run(model, IDS)[0], want, "bfloat16")


def test_what_was_loaded_is_saved_alike(tmp_path: Path) -> None:
    build(get_backend("numpy"), config_of()).save_pretrained(tmp_path / "first")
    mambax.load(tmp_path / "first", backend="numpy").save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("pooling", ["last", "mean", "state"])
def test_classifiers_and_feature_extractors(nn: Any, tmp_path: Path, pooling: Any) -> None:
    config = MambaClassificationConfig(d_model=8, n_layer=1, vocab_size=101, num_labels=3, pooling=pooling)
    classifier = nn.MambaForSequenceClassification(config)
    classifier.save_pretrained(tmp_path / "classifier")
    again = mambax.load(tmp_path / "classifier", backend=nn.name)
    assert again.config == config
    np.testing.assert_array_equal(nn.to_numpy(again(IDS).logits), nn.to_numpy(classifier(IDS).logits))

    extractor = nn.MambaForFeatureExtraction(config_of(), pooling=pooling)
    extractor.save_pretrained(tmp_path / "extractor")
    again = mambax.load(tmp_path / "extractor", backend=nn.name)
    assert (again.config, again.pooling) == (config_of(), pooling)
    np.testing.assert_array_equal(nn.to_numpy(again(IDS).features), nn.to_numpy(extractor(IDS).features))


def test_a_fractional_expand_is_kept(tmp_path: Path) -> None:
    model = get_backend("numpy").MambaForCausalLM(config_of(expand=1.5))
    model.save_pretrained(tmp_path)
    assert mambax.load(tmp_path, backend="numpy").config.d_inner == 60


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
    model = build(get_backend("numpy"), config_of())
    model.save_pretrained(tmp_path)
    assert_equal(numpy_files.load_file(tmp_path / "model.safetensors"), parameters(model))
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_fewer_files_replace_more_and_the_other_way_round(tmp_path: Path) -> None:
    nn = get_backend("numpy")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for seed, size in enumerate([20_000, 5 * 10**9, 30_000, 20_000]):
        model = build(nn, config_of(), weights_of(config_of(), seed))
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_equal(parameters(mambax.load(tmp_path, backend="numpy")), parameters(model))
        weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert weights == ["model.safetensors"] or weights[-1].endswith(f"of-{len(weights):05}.safetensors")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not list(tmp_path.glob(".*"))


def test_a_save_that_fails_leaves_the_older_checkpoint(
    nn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    build(nn, config).save_pretrained(tmp_path)
    before = contents(tmp_path)
    spoilt = rounded(weights_of(config, seed=1), "float32")
    spoilt["backbone.layers.2.mixer.x_proj.weight"][0, 0] = np.nan
    broken = build(nn, config, spoilt)
    with pytest.raises(ValueError, match=r"layers.2.mixer.x_proj.weight has weights that are NaN .* not saved"):
        broken.save_pretrained(tmp_path, max_shard_size=20_000)
    assert contents(tmp_path) == before

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(nn, config, weights_of(config, seed=2)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_model_that_config_json_cannot_describe_is_not_saved(tmp_path: Path) -> None:
    nn: Any = get_backend("numpy")

    class Wide(nn.MambaMixer):
        def __init__(self, config: Any, layer_idx: int = 0, *, init: Any = None) -> None:
            super().__init__(config, layer_idx, init=init)
            self.extra = np.zeros(3, np.float32)

    model = nn.MambaForCausalLM(config_of(), mixer_cls=Wide)
    with pytest.raises(ValueError, match=r"parameter backbone.layers.0.mixer.extra is \(3,\), expected none"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected a MambaForCausalLM, .* found MambaEncoder"):
        mambax.save_pretrained(nn.MambaEncoder(config_of()), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_mlx_model_quantised_in_another_mode_is_not_saved(tmp_path: Path) -> None:
    mlx_nn = pytest.importorskip("mlx.nn")
    model = get_backend("mlx").MambaForCausalLM(config_of(d_model=64, dt_rank=64, vocab_size=128))
    mlx_nn.quantize(model, mode="mxfp4")
    with pytest.raises(ValueError, match="adapters or quantised is saved with its framework's own means"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_convert_makes_what_transformers_opens(tmp_path: Path, tied: bool, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = config_of(vocab_size=104, tie_embeddings=tied)
    weights = rounded(weights_of(config), "float32")
    changes = {} if tied else {"tie_embeddings": False}
    write_original(tmp_path / "from", config, weights, vocab_size=101, legacy=legacy, **changes)
    mambax.convert(tmp_path / "from", tmp_path / "to")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "to").eval()
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS)).logits.numpy()
    assert_close(run(mambax.load(tmp_path / "from", backend="numpy"), IDS)[0], want)
    mambax.convert(tmp_path / "to", tmp_path / "narrow", dtype="bfloat16")
    narrow = parameters(mambax.load(tmp_path / "narrow", backend="numpy"))
    assert_equal(narrow, rounded(weights, "bfloat16"))


def test_convert_does_not_write_over_its_source(tmp_path: Path) -> None:
    build(get_backend("numpy"), config_of()).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="source and target are the same folder; name another"):
        mambax.convert(tmp_path, tmp_path / ".." / tmp_path.name)
    assert contents(tmp_path) == before


def test_the_tokenizer_is_saved_and_loaded(nn: Any, tmp_path: Path) -> None:
    vocabulary = {"<eos>": 0} | {word: i for i, word in enumerate(("to", "be", "or", "not"), start=1)}
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = nn.MambaForCausalLM(config_of(eos_token_id=None))
    model.tokenizer = mambax.Tokenizer(words, eos_token="<eos>", chat_template="{{ messages }}")
    model.save_pretrained(tmp_path / "with")
    again = mambax.load(tmp_path / "with", backend=nn.name)
    assert again.tokenizer.encode("to be or not to be") == [1, 2, 3, 4, 1, 2]
    assert again.tokenizer.eos_token_ids == (0,)
    assert again.tokenizer.chat_template == "{{ messages }}"
    assert not list((tmp_path / "with").glob(".*"))
    model.save_pretrained(tmp_path / "without", tokenizer=False)
    assert mambax.load(tmp_path / "without", backend=nn.name).tokenizer is None
