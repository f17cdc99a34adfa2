"""What the public functions refuse: each error says what was expected and found, and nothing is half-written.

What `generate` refuses is in test_generation_limits.py, damaged checkpoints in test_bad_checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Letters, assert_states_equal, assign, build, config_of, state_arrays, weights_of

import mambax
from mambax import get_backend
from mambax.adapters import add_lora, save_adapter
from mambax.options import AttentionOptions
from mambax.registry import is_installed

SHIPPED = Path(__file__).resolve().parent.parent / "models" / "tinyshakespeare"
CONFIG = config_of(n_layer=2)
IDS = [[3, 1, 4], [1, 5, 9]]


@pytest.fixture
def model(nn: Any) -> Any:
    return build(nn, CONFIG)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- names of backends, devices, configurations ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["", "Torch", "tensorflow", 3])
def test_an_unknown_backend_is_named_with_those_that_there_are(backend, tmp_path):
    build(get_backend("numpy"), CONFIG)(IDS).state.save(tmp_path / "a")
    for call in (
        lambda: mambax.load(SHIPPED, backend=backend),
        lambda: mambax.from_config(CONFIG, backend=backend),
        lambda: mambax.InferenceParams.load(tmp_path / "a", backend=backend),
    ):
        with pytest.raises(ValueError, match=rf"unknown backend {backend!r}; expected one of: .*numpy"):
            call()


@pytest.mark.parametrize("device", ["", "tpu", 0])
def test_an_unknown_device_is_named_with_those_that_there_are(nn, device, tmp_path):
    build(nn, CONFIG)(IDS).state.save(tmp_path / "a")
    for call in (
        lambda: mambax.load(SHIPPED, backend=nn.name, device=device),
        lambda: mambax.InferenceParams.load(tmp_path / "a", backend=nn.name, device=device),
    ):
        with pytest.raises(ValueError, match=rf"device is {device!r}; the {nn.name} backend has '.*' here"):
            call()


@pytest.mark.parametrize("config", [None, {"d_model": 8}, mambax.MambaConfig(d_model=8, n_layer=1)])
def test_a_new_model_needs_a_configuration_with_a_vocabulary(nn, config):
    with pytest.raises(ValueError, match=f"of type {type(config).__name__}; expected a MambaLMConfig"):
        mambax.from_config(config, backend=nn.name)


# --- what a model is given ---------------------------------------------------------------------------------------


def foreign(nn: Any) -> Any:
    """Token ids as an array of another framework."""
    other = "torch" if nn.name != "torch" else "mlx"
    if not is_installed(other):
        pytest.skip(f"{other} is not installed")
    return get_backend(other).from_numpy(np.array(IDS))


GIVEN: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "nothing": (lambda nn: {"input_ids": None}, "input_ids: expected whole numbers, found NoneType; give an array"),
    "a number": (lambda nn: {"input_ids": 3}, "input_ids: expected whole numbers, found int"),
    "one row": (lambda nn: {"input_ids": [1, 2]}, r"expected shape \(batch, length\).*found \(2,\)"),
    "floats": (
        lambda nn: {"input_ids": nn.from_numpy(np.ones((1, 2), np.float32))},
        "whole numbers, found .*float",
    ),
    "bools": (lambda nn: {"input_ids": nn.from_numpy(np.ones((1, 2), bool))}, "whole numbers, found .*bool"),
    "another framework's": (lambda nn: {"input_ids": foreign(nn)}, "array of the .* backend or of NumPy"),
    "mask of text": (lambda nn: {"mask": "left"}, "mask: expected True and False, or 1 and 0; found str"),
    "ragged mask": (lambda nn: {"mask": [[1], [1, 1, 1]]}, "mask: rows differ in length; pad them"),
    "mask of one row": (lambda nn: {"mask": [[1, 1, 1]]}, r"mask: expected .* = \(2, 3\), found \(1, 3\)"),
    "segments of text": (lambda nn: {"segment_ids": "a"}, "segment_ids: expected whole numbers, found str"),
    "ragged segments": (lambda nn: {"segment_ids": [[1], [1, 1, 1]]}, "segment_ids: rows differ in length"),
    "boundaries of numbers": (lambda nn: {"boundaries": [[1, 0, 0]] * 2}, "boundaries: expected True and False"),
    "boundaries of text": (lambda nn: {"boundaries": "a"}, "boundaries: expected True and False, found str"),
    "positions in words": (lambda nn: {"logits_to_keep": "last"}, "logits_to_keep is 'last'; expected 0"),
    "a part of a position": (lambda nn: {"logits_to_keep": 1.5}, "logits_to_keep is 1.5; expected 0"),
    "a state of text": (lambda nn: {"state": "a"}, "state: expected InferenceParams, found str"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_what_a_model_cannot_read_is_named(model, case):
    given, message = GIVEN[case]
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | given(model.nn)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int32"])
def test_token_ids_may_be_of_any_whole_dtype(model, dtype):
    want = model.nn.to_numpy(model(IDS).logits)
    ids = model.nn.astype(model.nn.from_numpy(np.array(IDS)), model.nn.dtype(dtype))
    np.testing.assert_array_equal(model.nn.to_numpy(model(ids).logits), want)


def test_a_batch_may_be_empty_but_not_negative(model):
    assert tuple(model(np.zeros((0, 3), np.int64)).logits.shape) == (0, 3, 101)
    assert model.init_state(0).batch == 0
    for batch in (-1, 1.5, "a", True):
        with pytest.raises(ValueError, match=f"batch is {batch!r}; expected a whole number of rows"):
            model.init_state(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": None}, "stop is None; expected a string"),
        ({"stop": 3}, "stop is 3; expected a string"),
        ({"stop": b"e"}, "stop is b'e'; expected a string"),
        ({"eos": 1.0}, "eos is 1.0; expected token ids from 0 to 100"),
        ({"eos": [None]}, r"eos is \[None\]; expected token ids"),
        ({"progress": 3}, "progress is 3; expected a function"),
        ({"prompt": np.array(3)}, "prompt is ndarray; expected text, a sequence"),
        ({"prompt": np.zeros((0, 3), np.int64)}, "list of prompts is empty"),
        ({"prompt": b"abc"}, "prompt is bytes; expected text"),
        ({"prompt": [1, "a"]}, "prompt 0 has .* values; expected text or whole token ids"),
    ],
)
def test_options_of_a_wrong_type_are_refused_at_the_call(model, options, message):
    model.tokenizer = Letters()
    with pytest.raises(ValueError, match=message):
        model.generate_streaming(**({"prompt": [1]} | options))


def test_prompts_of_another_framework_are_refused(model):
    array = foreign(model.nn)
    for prompt in (array, array[0], [array[0]]):
        with pytest.raises(ValueError, match=f"of whole numbers, and of NumPy or of the {model.nn.name} backend"):
            model.generate_streaming(prompt)
    with pytest.raises(ValueError, match="whole"):
        model.generate_streaming(model.nn.from_numpy(np.ones(3, np.float32)))


def test_more_tokens_to_keep_than_there_are_keep_all(model):
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 8, "eos": ()}
    assert model.generate([1], top_k=10**6, **options).tokens == model.generate([1], **options).tokens


# --- states ------------------------------------------------------------------------------------------------------


def test_rows_of_a_choice_between_states_are_checked(model):
    state, fresh = model(IDS).state, model.init_state(2)
    for rows in ([True], [True] * 3, [1, 0], "ab", np.array([[True, False]]), None):
        with pytest.raises(ValueError, match=r"InferenceParams.where: rows are .*; expected bool \(2,\)"):
            state.where(rows, fresh)
    with pytest.raises(ValueError, match="expected another state, found str"):
        state.where([True, False], "a")
    chosen = state.where([True, False], fresh)
    assert_states_equal(chosen.select(0), state.select(0))
    assert_states_equal(chosen.select(1), fresh.select(1))
    native = state.where(model.nn.from_numpy(np.array([True, False])), fresh)
    assert_states_equal(native, chosen)


def test_states_of_different_models_are_not_mixed(nn):
    attention = AttentionOptions(n_heads=2, head_dim=8, n_kv_heads=1)
    plain = build(nn, CONFIG).init_state(1)
    wider = mambax.from_config(config_of(n_layer=2, d_state=4), backend=nn.name).init_state(1)
    hybrids = [
        mambax.from_config(config_of(n_layer=2, attention=attention, layer_types=kinds), backend=nn.name)
        for kinds in (("mamba", "attention"), ("attention", "mamba"))
    ]
    first, second = (hybrid([[1, 2]]).state for hybrid in hybrids)
    for one, two in ((plain, wider), (plain, first), (first, second)):
        with pytest.raises(ValueError, match=r"where: layers\.\d\.\w+ is .* expected two states of the same model"):
            one.where([False], two)
    longer = hybrids[0]([[3, 4, 5]]).state
    assert first.where([False], longer).get_cache_info().tokens_seen == (3,)  # of one model, and further on


def test_a_state_is_written_to_a_file_alone(model, tmp_path):
    state = model(IDS).state
    with pytest.raises(IsADirectoryError, match="expected the name of a file to write, found a folder"):
        state.save(tmp_path)
    assert names(tmp_path) == []
    assert not list(tmp_path.parent.glob(".*tmp"))


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "found"), [(None, "of type NoneType"), (b"a", "of type bytes"), ("", "empty")])
def test_what_is_no_path_is_refused_by_name(model, path, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = model(IDS).state
    calls: dict[str, Callable[[], Any]] = {
        "the folder or repository": lambda: mambax.load(path, backend=model.nn.name),
        "folder": lambda: mambax.save_pretrained(model, path),
        "path": lambda: state.save(path),
        "path ": lambda: model.load_state(path),
        "path  ": lambda: mambax.InferenceParams.load(path),
        "folder ": lambda: mambax.Tokenizer.from_pretrained(path),
        "source": lambda: mambax.convert(path, tmp_path / "a"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} is {found}; expected a path"):
            call()
    assert names(tmp_path) == []  # the empty path is the current folder, which nobody has named


def test_any_characters_may_be_in_a_path(model, tmp_path):
    folder = tmp_path / "日本 é #%?"
    model.save_pretrained(folder)
    assert mambax.load(str(folder), backend=model.nn.name).config == CONFIG
    model(IDS).state.save(folder / "ü.state")
    assert_states_equal(model.load_state(folder / "ü.state"), model(IDS).state)


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_in_the_place_of_a_file_stops_a_save_before_it_begins(model, place, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"older")
    before = names(tmp_path)
    with pytest.raises(IsADirectoryError, match=rf"{place}: expected a file or nothing, found a folder"):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == before


def test_a_save_that_is_refused_leaves_no_folder(nn, tmp_path):
    weights = weights_of(CONFIG)
    weights["backbone.norm_f.weight"] = np.full_like(weights["backbone.norm_f.weight"], np.nan)
    bad = assign(nn, nn.MambaForCausalLM(CONFIG), {name: a.astype(np.float32) for name, a in weights.items()})
    with pytest.raises(ValueError, match=r"norm_f\.weight has weights that are NaN or infinite"):
        bad.save_pretrained(tmp_path / "new")
    assert names(tmp_path) == []
    build(nn, CONFIG).save_pretrained(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        bad.save_pretrained(tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_only_models_are_saved(tmp_path):
    for thing in (None, "folder", object()):
        with pytest.raises(ValueError, match=f"expected a model of mambax, found {type(thing).__name__}"):
            mambax.save_pretrained(thing, tmp_path / "a")
    assert names(tmp_path) == []


def test_a_save_over_another_model_leaves_nothing_of_it(nn, tmp_path):
    build(nn, CONFIG).save_pretrained(tmp_path, max_shard_size=10_000)
    assert len(names(tmp_path)) > 3
    other = mambax.from_config(config_of(n_layer=1, d_state=4), backend=nn.name)
    other.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    again = mambax.load(tmp_path, backend=nn.name)
    assert again.config == other.config
    assert_states_equal(state_arrays(again([[1, 2]]).state), other([[1, 2]]).state)


@pytest.mark.parametrize("size", [0, -1, 1.5, "5GB"])
def test_a_size_of_shards_is_a_number_of_bytes(size, tmp_path):
    with pytest.raises(ValueError, match=f"max_shard_size is {size!r}; expected a whole number of bytes"):
        mambax.save_pretrained(build(get_backend("numpy"), CONFIG), tmp_path / "a", max_shard_size=size)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_saved_whole_or_not_at_all(model, name, tmp_path):
    add_lora(model, ["in_proj"])
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name}: expected a file or nothing, found a folder"):
        save_adapter(model, tmp_path)
    assert names(tmp_path) == [name]
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="expected a folder to write to, found a file"):
        save_adapter(model, tmp_path / "file")


def test_conversations_are_saved_whole_or_not_at_all(nn, tmp_path):
    shipped = mambax.load(SHIPPED, backend=nn.name)
    talk = mambax.Conversation(shipped)
    for _ in talk.say("ROMEO:", max_new_tokens=2):
        pass
    for name in ("a", "b.json", "c.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match="expected a name for two files, found a folder"):
            talk.save(tmp_path / name[0])
    assert names(tmp_path) == ["a", "b.json", "c.safetensors"]
    for name in talk.save(tmp_path / "d"):
        name.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name.name}: no such file; expected one of the two"):
            talk.load(tmp_path / "d")
        talk.save(tmp_path / "d")
    for thing in (None, "models", mambax.Tokenizer):
        with pytest.raises(ValueError, match=f"needs a causal language model, found {type(thing).__name__}"):
            mambax.Conversation(thing)
    with pytest.raises(ValueError, match="unknown chat template 3; expected one of"):
        mambax.Conversation(shipped, template=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_row_without_positions_has_no_features(nn, pooling):
    extractor = nn.MambaForFeatureExtraction(CONFIG, pooling=pooling)
    with pytest.raises(ValueError, match=f"mask: row 1 has no position that exists; pooling '{pooling}'"):
        extractor(IDS, mask=[[1, 0, 0], [0, 0, 0]])


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_in_the_place_of_a_file_is_no_missing_file(nn, name, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name}: expected a file, found a folder"):
        mambax.load(folder, backend=nn.name)


def changed(folder: Path, **fields: Any) -> Path:
    """A checkpoint with some fields of its config.json changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [("expand", float("nan")), ("unknown", [1.0, float("nan")]), ("layer_norm_epsilon", {"__float__": "NaN"})],
)
def test_a_number_that_is_none_is_named_wherever_it_is(field, value, tmp_path):
    folder = changed(shutil.copytree(SHIPPED, tmp_path / "model"), **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*'{field}' is NaN; expected a number"):
        mambax.load(folder, backend="numpy")


def test_fields_of_a_newer_mambax_are_not_ignored(tmp_path):
    own = mambax.from_config(config_of(n_layer=1, residual_multiplier=0.5), backend="numpy")
    own.save_pretrained(tmp_path / "own")
    assert mambax.load(changed(tmp_path / "own", transformers_version="99"), backend="numpy").config == own.config
    with pytest.raises(ValueError, match=r"unknown field 'gated_residual'; expected .* update mambax"):
        mambax.load(changed(tmp_path / "own", gated_residual=True), backend="numpy")
    hidden = shutil.copytree(SHIPPED, tmp_path / "shipped")
    for value in ({"rescale_prenorm_residual": True, "gated_residual": True}, 3, []):
        with pytest.raises(ValueError, match=r"config\.json: mambax is .*; expected .* update mambax"):
            mambax.load(changed(hidden, mambax=value), backend="numpy")
