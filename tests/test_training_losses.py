"""Losses: the numbers of PyTorch and of the float64 recurrence, their gradients, and the memory that they take.

Dimensions: B batch, L length, M d_model, V vocabulary, C num_labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from harness import WITH_GRADIENTS, backend_params, build, config_of, token_ids, weights_of
from test_gradients import central_differences
from tolerances import GRADIENT, assert_close, relative_error

from mambax import MambaClassificationConfig, get_backend
from mambax.training import losses

CONFIG = config_of(d_model=4, n_layer=1, d_state=2, d_conv=2, dt_rank=1, vocab_size=7)
WEIGHTS = weights_of(CONFIG)
BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
RNG = np.random.default_rng(0)
IDS = np.array([[1, 5, 5, 0, 2, 6], [3, 3, 6, 1, 4, 0]])
LABELS = np.where(RNG.random(IDS.shape) < 0.3, -100, IDS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy of targets (B, L) that are not -100, one by one."""
    found = [
        (-log_softmax(logits[place])[target], logits[place].argmax() == target)
        for place, target in np.ndenumerate(targets)
        if target != -100
    ]
    return tuple(np.mean(found, axis=0))


def shifted(labels: np.ndarray) -> np.ndarray:
    return np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], 1)


def loss_and_accuracy(model: Any, *args: Any, **options: Any) -> tuple[float, float]:
    with model.nn.no_grad():
        output = model(*args, **options)
    return float(model.nn.to_numpy(output.loss)), float(model.nn.to_numpy(output.accuracy))


def test_the_loss_of_a_language_model(nn):
    model = build(nn, CONFIG, WEIGHTS)
    want = expected(reference.logits(WEIGHTS, IDS), shifted(LABELS))
    for options in ({"labels": LABELS}, {"shift_labels": shifted(LABELS)}, {"labels": LABELS.tolist()}):
        assert_close(loss_and_accuracy(model, IDS, **options), want, what=str(options))
    loss, _ = loss_and_accuracy(model, IDS, labels=LABELS, num_items_in_batch=10)
    assert_close(loss, want[0] * (shifted(LABELS) != -100).sum() / 10)


def test_logits_are_there_when_they_are_asked_for(nn):
    model = build(nn, CONFIG, WEIGHTS)
    assert model(IDS, labels=IDS).logits is None
    assert model(IDS).loss is None
    output = model(IDS, labels=IDS, return_logits=True, logits_to_keep=2)
    assert_close(nn.to_numpy(nn.stop_gradient(output.logits)), reference.logits(WEIGHTS, IDS)[:, -2:])


def test_padding_and_boundaries_have_no_targets(nn):
    model = build(nn, CONFIG, WEIGHTS)
    alone = [expected(reference.logits(WEIGHTS, row[None]), shifted(row[None])) for row in (IDS[0, :4], IDS[1])]
    want = (alone[0][0] * 3 + alone[1][0] * 5) / 8
    left = np.concatenate([[[9 % 7, 2]], IDS[:1, :4]], 1), IDS[1:]
    right = np.concatenate([IDS[:1, :4], [[2, 2]]], 1), IDS[1:]
    for rows, mask in ((left, [0, 0, 1, 1, 1, 1]), (right, [1, 1, 1, 1, 0, 0])):
        ids = np.concatenate(rows)
        got = loss_and_accuracy(model, ids, mask=np.array([mask, [1] * 6], bool), labels=ids)
        assert_close(got[0], want)
    packed = np.concatenate([IDS[:1, :4], IDS[1:]], 1)
    segments = np.array([[0] * 4 + [1] * 6])
    assert_close(loss_and_accuracy(model, packed, labels=packed, segment_ids=segments)[0], want)
    begins = np.diff(segments, prepend=0).astype(bool)
    assert_close(loss_and_accuracy(model, packed, labels=packed, boundaries=begins)[0], want)


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_every_chunk_gives_the_same(nn, rows):
    rng = np.random.default_rng(1)
    hidden = nn.from_numpy(rng.standard_normal((2, 5, 4)).astype(np.float32))
    layer = nn.Linear(rng.standard_normal((7, 4)).astype(np.float32), None)
    targets = np.array([[1, -100, 3, 6, 0], [2, 2, -100, -100, 5]])
    with nn.no_grad():
        logits = nn.to_numpy(layer(hidden))
        got = losses.cross_entropy(nn, layer, layer, hidden, nn.from_numpy(targets), 7, rows=rows)
    assert_close([float(nn.to_numpy(x)) for x in got], expected(logits, targets))


def gradients(model: Any, function: Any) -> dict[str, np.ndarray]:
    """Of a scalar, by parameter."""
    if model.nn.name == "torch":
        model.zero_grad()
        function().backward()
        return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    import mlx.nn
    from mlx.utils import tree_flatten

    _, found = mlx.nn.value_and_grad(model, function)()
    return {name: np.array(array) for name, array in tree_flatten(found)}


@BACKENDS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [2, 100])
def test_gradients_of_the_chunked_loss(backend, tied, rows, monkeypatch):
    monkeypatch.setattr(losses, "chunk_rows", lambda size: rows)
    nn = get_backend(backend)
    config = config_of(**(CONFIG.to_dict() | {"tie_embeddings": tied}))
    weights = weights_of(config)
    values = {name: np.array(array, np.float64) for name, array in weights.items()}
    names = ["backbone.embeddings.weight", "backbone.layers.0.mixer.A_log", "backbone.norm_f.weight"]
    names += [] if tied else ["lm_head.weight"]

    def loss() -> float:
        return expected(reference.logits(values, IDS), shifted(LABELS))[0]

    model = build(nn, config, weights)
    got = gradients(model, lambda: model(IDS, labels=LABELS).loss)
    for name in names:
        assert_close(got[name], central_differences(loss, values[name]), what=name, tolerance=GRADIENT["float32"])
    wrong = central_differences(lambda: loss() * 1.01, values[names[0]])
    assert relative_error(got[names[0]], wrong) > 30 * GRADIENT["float32"]


@BACKENDS
def test_gradient_checkpointing_changes_nothing_but_memory(backend):
    nn = get_backend(backend)
    config = config_of(n_layer=2)
    model = build(nn, config)
    ids = token_ids(2, 9)
    mask = np.arange(9) < np.array([[9], [6]])
    begins = np.zeros((2, 9), bool)
    begins[:, 4] = True

    def through_a_state() -> Any:
        first = model(ids[:, :4], labels=ids[:, :4])
        return first.loss + model(ids[:, 4:], first.state, labels=ids[:, 4:]).loss

    cases = [through_a_state] + [
        lambda options=options: model(ids, labels=ids, **options).loss
        for options in ({}, {"mask": mask}, {"boundaries": begins})
    ]
    for case in cases:
        found = []
        for switched_on in (False, True):
            model.backbone.gradient_checkpointing = switched_on
            found.append(gradients(model, case))
        for name, want in found[0].items():
            assert_close(found[1][name], want, what=name, tolerance=1e-6)


def test_the_gradient_goes_through_the_state_that_a_window_starts_from():
    """Two windows joined by their state give the gradient of one: what truncation leaves out."""
    nn = get_backend("torch")
    model, ids = build(nn, CONFIG, WEIGHTS, "float64"), np.concatenate([IDS, IDS], 1)
    targets = shifted(ids)

    def in_two(detached: bool) -> Any:
        first = model(ids[:, :5], shift_labels=targets[:, :5], num_items_in_batch=22)
        state = first.state.detach() if detached else first.state
        return first.loss + model(ids[:, 5:], state, shift_labels=targets[:, 5:], num_items_in_batch=22).loss

    whole = gradients(model, lambda: model(ids, labels=ids).loss)
    joined, cut = gradients(model, lambda: in_two(False)), gradients(model, lambda: in_two(True))
    for name, want in whole.items():
        assert_close(joined[name], want, "float64", what=name, tolerance=1e-10)
    assert relative_error(cut["backbone.layers.0.mixer.A_log"], whole["backbone.layers.0.mixer.A_log"]) > 1e-3


ROWS, WIDTH, SIZE = 2048, 16, 4096


def largest_share(backend: str, rows: int) -> float:
    """Memory of loss and gradient over all logits: the largest tensor in torch, the highest total in MLX."""
    nn = get_backend(backend)
    rng = np.random.default_rng(0)
    layer = nn.Linear(rng.standard_normal((SIZE, WIDTH), np.float32), None)
    hidden = nn.from_numpy(rng.standard_normal((1, ROWS, WIDTH), np.float32))
    targets = nn.from_numpy(rng.integers(0, SIZE, (1, ROWS)))

    def loss() -> Any:
        return losses.cross_entropy(nn, layer, layer, hidden, targets, SIZE, rows=rows).loss

    if backend == "torch":
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Largest(TorchDispatchMode):
            found = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                sizes = [x.numel() for x in tree_leaves(output) if hasattr(x, "numel")]
                self.found = max([self.found, *sizes])
                return output

        with Largest() as largest:
            loss().backward()
        return largest.found / (ROWS * SIZE)
    import mlx.core as mx
    import mlx.nn

    mx.eval(hidden, targets, layer.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mlx.nn.value_and_grad(layer, loss)())
    return (mx.get_peak_memory() - before) / (ROWS * SIZE * 4)


@BACKENDS
def test_the_logits_of_all_positions_are_never_in_memory(backend):
    limit = {"torch": 1 / 16, "mlx": 0.7}[backend]  # chunks of 1/32 of the rows, and what their gradient needs
    assert largest_share(backend, ROWS // 32) <= limit
    assert largest_share(backend, ROWS) >= {"torch": 1, "mlx": 2}[backend]


# --- classifiers -------------------------------------------------------------------------------------------------


def classifier(nn: Any, labels: int) -> Any:
    fields = CONFIG.to_dict() | {"num_labels": labels, "tie_embeddings": True}
    return nn.MambaForSequenceClassification(MambaClassificationConfig(**fields))


def test_the_losses_of_classifiers(nn):
    logits = RNG.standard_normal((4, 3)).astype(np.float32) * 3
    wide, x = logits.astype(np.float64), nn.from_numpy(logits)

    def run(labels: Any, **options: Any) -> list[Any]:
        found = losses.classification(nn, x, labels, **options)
        return [None if value is None else float(nn.to_numpy(value)) for value in found]

    single = np.array([2, 0, -100, 1])
    assert_close(run(single), expected(wide[:, None], single[:, None]))
    assert_close(run(nn.from_numpy(single)), expected(wide[:, None], single[:, None]))
    several = (RNG.random((4, 3)) < 0.5).astype(np.float32)
    sigmoid = 1 / (1 + np.exp(-wide))
    cross = -np.where(several > 0.5, np.log(sigmoid), np.log(1 - sigmoid)).mean()
    assert_close(run(several), [cross, ((wide > 0) == (several > 0.5)).mean()])
    numbers = RNG.standard_normal((4, 3))
    loss, accuracy = run(numbers, problem_type="regression")
    assert_close(loss, ((wide - numbers) ** 2).mean(), tolerance=1e-6)
    assert accuracy is None
    column = losses.classification(nn, x[:, :1], numbers[:, 0])
    assert_close(float(nn.to_numpy(column.loss)), ((wide[:, 0] - numbers[:, 0]) ** 2).mean(), tolerance=1e-6)
    assert_close(run(single[[0, 1, 3, 3]], divisor=8)[0] * 2, run(single[[0, 1, 3, 3]])[0])


def test_a_classifier_returns_its_loss(nn):
    model = classifier(nn, 3)
    output = model(IDS, labels=[2, 0])
    logits = nn.to_numpy(nn.stop_gradient(output.logits)).astype(np.float64)
    want = expected(logits[:, None], np.array([[2], [0]]))
    assert_close([float(nn.to_numpy(nn.stop_gradient(x))) for x in output[2:]], want)


BAD = {
    "a label outside": ({"labels": [[1, 7, 2, 3, 4, 5]] * 2}, r"found 7.*0 to 6.*-100"),
    "a negative label": ({"labels": IDS - 3}, r"found -\d; expected 0 to 6"),
    "another shape": ({"labels": IDS[:, :4]}, r"\(2, 6\).*found \(2, 4\)"),
    "ragged rows": ({"labels": [[1, 2], [3]]}, "differ in length.*-100"),
    "floats": ({"labels": IDS * 0.5}, "whole numbers, found float64"),
    "both": ({"labels": IDS, "shift_labels": IDS}, "both"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_labels_are_refused(nn, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build(nn, CONFIG, WEIGHTS)(IDS, **options)


def test_one_token_has_nothing_to_predict(nn):
    with pytest.raises(ValueError, match="at least 2"):
        build(nn, CONFIG, WEIGHTS)(IDS[:, :1], labels=IDS[:, :1])


@BACKENDS
def test_a_label_outside_that_nobody_looked_at_shows_as_nan(backend):
    nn = get_backend(backend)
    labels = nn.from_numpy(np.where(IDS == 6, 100, IDS))
    assert np.isnan(loss_and_accuracy(build(nn, CONFIG, WEIGHTS), IDS, labels=labels)[0])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 3], {}, "found 3; expected 0 to 2"),
        ([0, 1, 2], {}, r"expected shape \(2,\).*found \(3,\)"),
        ([[0.0, 1.0]] * 2, {}, r"expected shape \(2, 3\).*found \(2, 2\)"),
        ([0, 1], {"problem_type": "ranking"}, "'ranking'.*single_label_classification"),
    ],
)
def test_wrong_labels_of_a_classifier_are_refused(nn, labels, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(nn, 3)(IDS, labels=labels, **options)
