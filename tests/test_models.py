"""The models and their parts: encoder, mixer, poolings, heads, and mixers of one's own.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
from harness import assign, build, config_of, installed, rounded, run, state_arrays, token_ids, weights_of
from tolerances import assert_close, relative_error

import mambax
from mambax import MambaClassificationConfig, MambaConfig, get_backend
from mambax.blocks import LayerState
from mambax.init import Initializer
from mambax.options import Mamba2Options

CONFIG = config_of(n_layer=2)
WEIGHTS = weights_of(CONFIG)
SIZES = {"d_model": 12, "n_layer": 2, "d_state": 3, "d_conv": 4, "dt_rank": 2}


def put(nn: Any, module: Any, prefix: str) -> Any:
    """Give a part of a model the weights that stand under a prefix."""
    held = {n.removeprefix(prefix): a for n, a in rounded(WEIGHTS, "float32").items() if n.startswith(prefix)}
    return assign(nn, module, held)


# --- the parts by themselves -------------------------------------------------------------------------------------


def test_a_mixer_alone(nn):
    mixer = put(nn, nn.MambaMixer(CONFIG), "backbone.layers.1.mixer.")
    x = np.random.default_rng(0).standard_normal((1, 11, 40)).astype(np.float32)
    state = reference.start(WEIGHTS)
    past, h, want = state.past[1], state.h[1], []
    for row in np.float64(x[0]):
        y, past, h = reference.mixer_step(WEIGHTS, "backbone.layers.1.mixer.", row, past, h)
        want.append(y)
    with nn.no_grad():
        y, after = mixer(nn.from_numpy(x))
        first, middle = mixer(nn.from_numpy(x[:, :4]), mixer.init_state(1))
        second, end = mixer(nn.from_numpy(x[:, 4:]), middle)
    assert_close(nn.to_numpy(y)[0], want)
    assert_close(np.concatenate([nn.to_numpy(first), nn.to_numpy(second)], 1)[0], want)
    for got in (after, end):
        assert_close(nn.to_numpy(got.conv)[0], past)
        assert_close(nn.to_numpy(got.ssm)[0], h)


def test_a_block_alone(nn):
    block = put(nn, nn.Block(CONFIG), "backbone.layers.0.")
    mixer = put(nn, nn.MambaMixer(CONFIG), "backbone.layers.0.mixer.")
    x = np.random.default_rng(0).standard_normal((2, 5, 40)).astype(np.float32)
    with nn.no_grad():
        y, _ = block(nn.from_numpy(x))
        mixed, _ = mixer(block.norm(nn.from_numpy(x)))
    assert_close(nn.to_numpy(y), x + nn.to_numpy(mixed))


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_is_as_wide_as_configured(nn, wide):
    """In bfloat16 it decides what is lost between blocks; the tolerance of whole models would not see it."""
    config = config_of(n_layer=2, residual_in_fp32=wide)
    model = build(nn, config, weights_of(config), "bfloat16")
    with nn.no_grad():
        hidden = model.backbone.embeddings(nn.from_numpy(token_ids(2, 5)))
        assert hidden.dtype == nn.dtype("bfloat16")
        for layer in model.backbone.layers:
            hidden, _ = layer(hidden)
            assert hidden.dtype == (nn.float32 if wide else nn.dtype("bfloat16"))


def test_an_encoder_alone_has_no_vocabulary(nn):
    config = MambaConfig(**SIZES)
    encoder = nn.MambaEncoder(config, init=Initializer(3))
    assert not any("embed" in name or "head" in name for name in nn.parameters(encoder))
    x = np.random.default_rng(0).standard_normal((2, 9, 12)).astype(np.float32)
    with nn.no_grad():
        whole = encoder(nn.from_numpy(x))
        first = encoder(nn.from_numpy(x[:, :4]))
        second = encoder(nn.from_numpy(x[:, 4:]), first.state)
        mask = np.arange(9) < np.array([[9], [6]])
        padded = encoder(nn.from_numpy(x), mask=mask)
        alone = encoder(nn.from_numpy(x[1:, :6]))
    hidden = nn.to_numpy(whole.hidden_states)
    assert hidden.shape == (2, 9, 12)
    got = np.concatenate([nn.to_numpy(first.hidden_states), nn.to_numpy(second.hidden_states)], 1)
    assert_close(got, hidden)
    assert_close(nn.to_numpy(padded.hidden_states)[1, :6], nn.to_numpy(alone.hidden_states)[0])
    for shape in ((2, 9, 11), (9, 12), (2, 0, 12)):
        with pytest.raises(ValueError, match=r"inputs: expected \(batch, length of at least 1, d_model 12\)"):
            encoder(nn.from_numpy(np.zeros(shape, np.float32)))


def test_the_encoder_in_a_model_is_the_recurrence(nn):
    model = build(nn, CONFIG, WEIGHTS)
    ids = token_ids(2, 12)
    with nn.no_grad():
        hidden = model.backbone(model.backbone.embeddings(nn.from_numpy(ids))).hidden_states
    want = np.stack([reference.encode_row(WEIGHTS, row)[0] for row in ids])
    assert_close(nn.to_numpy(hidden), want)


# --- a mixer of one's own ----------------------------------------------------------------------------------------


def running_mean_mixer(nn: Any) -> Any:
    """A mixer class of a backend: a projected running mean, whose state has sizes of its own."""

    class RunningMean(nn.Module):
        def __init__(self, config: Any, layer_idx: int, *, init: Any) -> None:
            super().__init__()
            self.layer_idx = layer_idx
            self.proj = nn.Linear(init.linear(config.d_model, config.d_model), None)

        def forward(self, hidden: Any, state: Any = None, mask: Any = None) -> tuple[Any, LayerState]:
            if state is None:
                state = self.init_state(hidden.shape[0])
            total = state.ssm[:, None] + nn.cumulative_sum(hidden, axis=1)  # (B, L, M)
            steps = nn.astype(nn.arange(hidden.shape[1], like=hidden) + 1, nn.float32)
            count = state.conv[:, None] + steps[:, None]  # (B, L, 1)
            return self.proj(total / count), LayerState(count[:, -1], total[:, -1])

        def init_state(self, batch: int) -> LayerState:
            weight = self.proj.weight
            return LayerState(
                nn.zeros((batch, 1), nn.float32, like=weight),
                nn.zeros((batch, weight.shape[1]), nn.float32, like=weight),
            )

    return RunningMean


def test_the_mixer_class_is_replaceable(nn):
    mixer_cls = running_mean_mixer(nn)
    config = config_of(n_layer=3)
    model = nn.MambaForCausalLM(config, mixer_cls=mixer_cls, init=Initializer(1))
    names = set(nn.parameters(model))
    assert {f"backbone.layers.{i}.mixer.proj.weight" for i in range(3)} <= names
    assert not any("A_log" in name for name in names)
    assert [layer.mixer.layer_idx for layer in model.backbone.layers] == [0, 1, 2]
    ids = token_ids(2, 9)
    whole, end = run(model, ids)
    first, state = run(model, ids[:, :4])
    second, after = run(model, ids[:, 4:], state)
    assert_close(np.concatenate([first, second], 1), whole)
    assert after.get_cache_info().tokens_seen == end.get_cache_info().tokens_seen == (9, 9)
    want = [int(run(model, [[1, 2, 3]])[0][0, -1].argmax())]
    assert model.generate([1, 2, 3], max_new_tokens=1).tokens == want
    assert len(model.generate([[1, 2], [3, 4]], max_new_tokens=4, state=model.init_state(2))) == 2


def test_every_model_takes_a_mixer_class(nn):
    mixer_cls = running_mean_mixer(nn)
    labelled = MambaClassificationConfig(**SIZES, vocab_size=9, num_labels=4)
    for model in (
        nn.MambaEncoder(labelled, mixer_cls=mixer_cls),
        nn.MambaForFeatureExtraction(labelled, mixer_cls=mixer_cls),
        nn.MambaForSequenceClassification(labelled, mixer_cls=mixer_cls),
    ):
        assert any(name.endswith("layers.1.mixer.proj.weight") for name in nn.parameters(model))


def test_one_definition_with_a_replaced_mixer_agrees_on_every_backend():
    logits = []
    for name in installed():
        nn = get_backend(name)
        model = nn.MambaForCausalLM(config_of(), mixer_cls=running_mean_mixer(nn), init=Initializer(1))
        logits.append(run(model, token_ids(2, 20))[0])
    for other in logits:
        assert_close(other, logits[0])


# --- poolings, features, classes ---------------------------------------------------------------------------------

POOLINGS = pytest.mark.parametrize("pooling", ["last", "mean", "state"])
LENGTHS = (8, 3, 1)
MASKS = {
    "left": np.arange(8) >= 8 - np.array(LENGTHS)[:, None],
    "right": np.arange(8) < np.array(LENGTHS)[:, None],
    "holes": np.array([[1] * 8, [0, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]], bool),
}


def pooled(row: np.ndarray, pooling: str) -> np.ndarray:
    """What a pooling makes of one row, by the independent recurrence."""
    hidden, state = reference.encode_row(WEIGHTS, row)
    return {"last": hidden[-1], "mean": hidden.mean(0), "state": state.h[-1].flatten()}[pooling]


def ragged(padding: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    mask = MASKS[padding]
    rows = [token_ids(1, 9, seed=i)[0, :length] for i, length in enumerate(LENGTHS)]
    ids = np.full(mask.shape, 100)
    ids[mask] = np.concatenate(rows)
    return ids, mask, rows


@POOLINGS
@pytest.mark.parametrize("padding", MASKS)
def test_feature_extraction(nn, pooling, padding):
    model = nn.MambaForFeatureExtraction(CONFIG, pooling=pooling)
    assign(nn, model, {n: a for n, a in rounded(WEIGHTS, "float32").items() if not n.startswith("lm_head")})
    ids, mask, rows = ragged(padding)
    with nn.no_grad():
        got = model(ids, mask=mask).features
        full = model(token_ids(2, 6)).features
    assert got.dtype == nn.float32
    assert_close(nn.to_numpy(got), np.stack([pooled(row, pooling) for row in rows]))
    assert_close(nn.to_numpy(full), np.stack([pooled(row, pooling) for row in token_ids(2, 6)]))
    wrong = np.stack([pooled(row, pooling) for row in ids])  # what comes of a mask ignored
    assert relative_error(nn.to_numpy(got), wrong) > 1e-2


@POOLINGS
@pytest.mark.parametrize("padding", MASKS)
def test_sequence_classification(nn, pooling, padding):
    config = MambaClassificationConfig(**CONFIG.to_dict(), num_labels=5, pooling=pooling)
    model = nn.MambaForSequenceClassification(config)
    rng = np.random.default_rng(0)
    size = 80 * 8 if pooling == "state" else 40
    head = {"score.weight": rng.standard_normal((5, size)), "score.bias": rng.standard_normal(5)}
    held = {n: a for n, a in (WEIGHTS | head).items() if not n.startswith("lm_head")}
    assign(nn, model, rounded(held, "float32"))
    ids, mask, rows = ragged(padding)
    with nn.no_grad():
        output = model(ids, mask=mask)
    want = np.stack([np.float32(head["score.weight"]) @ pooled(r, pooling) for r in rows]) + head["score.bias"]
    assert_close(nn.to_numpy(output.logits), want)
    assert output.state.get_cache_info().tokens_seen == LENGTHS


@POOLINGS
def test_narrow_classifiers(nn, pooling):
    config = MambaClassificationConfig(**SIZES, vocab_size=101, num_labels=5, pooling=pooling)
    wide = nn.MambaForSequenceClassification(config, init=Initializer(2))
    narrow = nn.MambaForSequenceClassification(config, init=Initializer(2))
    weights = {name: nn.to_numpy(array) for name, array in nn.parameters(wide).items()}
    assign(nn, narrow, rounded(weights, "bfloat16"))
    with nn.no_grad():
        got, want = narrow(token_ids(2, 20)).logits, wide(token_ids(2, 20)).logits
    assert got.dtype == nn.float32
    assert_close(nn.to_numpy(got), nn.to_numpy(want), tolerance=0.1)


def test_from_config_builds_what_the_configuration_describes(nn):
    model = mambax.from_config(CONFIG, backend=nn.name)
    assert isinstance(model, nn.MambaForCausalLM)
    labelled = MambaClassificationConfig(**CONFIG.to_dict(), num_labels=5)
    assert isinstance(mambax.from_config(labelled, backend=nn.name), nn.MambaForSequenceClassification)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        nn.MambaForFeatureExtraction(CONFIG, pooling="max")


# --- what a model refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 101]], "token id 101 is outside the vocabulary of 101"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        (np.array([[5, 10**12]]), "token id 1000000000000 is outside"),
        ([[1.0, 2.0]], "expected whole numbers, found float64"),
        ([["a"]], "expected whole numbers"),
        ([[1, 2], [3]], "rows differ in length"),
        ([1, 2, 3], r"expected shape \(batch, length\)"),
        ([[]], "at least one token"),
        (np.zeros((2, 0), np.int64), "at least one token"),
        ([[[1]]], r"expected shape \(batch, length\)"),
        (np.array([[True, False]]), "expected whole numbers, found bool"),
    ],
)
def test_token_ids_that_are_refused(nn, ids, message):
    with pytest.raises(ValueError, match=message):
        nn.MambaForCausalLM(CONFIG)(ids)


def test_an_unknown_scan_is_refused_with_the_list(nn):
    with pytest.raises(ValueError, match=r"'warp'.*sequential"):
        nn.MambaForCausalLM(config_of(scan="warp"))([[1]])


MAMBA2 = config_of(n_layer=1, layer_types=("mamba2",), mamba2=Mamba2Options(n_heads=5, head_dim=6, d_state=7))


@pytest.mark.parametrize("impl", ["auto", "sequential", "chunked"])
def test_mamba2_scans_as_the_configuration_says(nn, impl, monkeypatch):
    found, ssd = [], nn.ssd
    monkeypatch.setattr(nn, "ssd", lambda *args, impl, **options: found.append(impl) or ssd(*args, **options))
    nn.MambaForCausalLM(dataclasses.replace(MAMBA2, scan=impl))([[1, 2]])
    assert found == [impl]


def test_a_scan_that_mamba2_does_not_have_is_refused_with_the_list(nn, tmp_path):
    model = nn.MambaForCausalLM(dataclasses.replace(MAMBA2, scan="pscan"))
    with pytest.raises(ValueError, match=r"'pscan'.*sequential, chunked"):
        model([[1]])
    model.save_pretrained(tmp_path)
    assert mambax.load(tmp_path, backend=nn.name, scan="chunked").config.scan == "chunked"
    with pytest.raises(ValueError, match=r"'pscan'.*sequential, chunked"):
        mambax.load(tmp_path, backend=nn.name, scan="pscan")


def test_every_integer_type_of_ids(nn):
    model = build(nn, CONFIG, WEIGHTS)
    want, _ = run(model, [[1, 2, 3]])
    for dtype in (np.int32, np.int64, np.uint8, np.uint16):
        np.testing.assert_array_equal(run(model, np.array([[1, 2, 3]], dtype))[0], want)
    for dtype in (np.int32, np.int64):
        np.testing.assert_array_equal(run(model, nn.from_numpy(np.array([[1, 2, 3]], dtype)))[0], want)


def test_states_are_of_the_backend(nn):
    state = nn.MambaForCausalLM(CONFIG).init_state(3)
    assert isinstance(state, nn.InferenceParams)
    assert isinstance(state, mambax.InferenceParams)
    shapes = {name: array.shape for name, array in state_arrays(state).items()}
    assert shapes == {
        "tokens_seen": (3,),
        **{f"layers.{i}.conv_state": (3, 2, 80) for i in range(2)},
        **{f"layers.{i}.ssm_state": (3, 80, 8) for i in range(2)},
    }
