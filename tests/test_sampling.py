"""Choosing tokens: every filter against a brute-force definition, and the same choice on every backend.

Dimensions: B batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import build, config_of, installed, token_ids

from mambax import get_backend
from mambax.sampling import SamplingParams, UniformSource, sample

GRID = np.linspace(0, 1, 4001, endpoint=False, dtype=np.float32)


def choose(nn: Any, logits: np.ndarray, uniform: Any, seen: np.ndarray | None = None, **options: Any) -> list[int]:
    """The op on NumPy values: logits (B, V), uniform numbers (B,)."""
    uniform = nn.from_numpy(np.asarray(uniform, np.float32)[:, None])
    seen = None if seen is None else nn.from_numpy(seen)
    tokens = sample(nn, nn.from_numpy(logits), uniform, SamplingParams(**options), seen)
    assert tokens.dtype == nn.int64
    return nn.to_numpy(tokens).tolist()


def reachable(nn: Any, logits: Any, **options: Any) -> set[int]:
    """Every token that some uniform number leads to."""
    logits = np.asarray(logits, np.float32)
    return set(choose(nn, np.tile(logits, (len(GRID), 1)), GRID, **options))


def brute_force(logits: np.ndarray, seen: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Probabilities (V,) after every filter, by loops over tokens, in float64."""
    params = SamplingParams(**options)
    x = np.float64(logits)
    for token in range(len(x)):
        if seen is not None and seen[token]:
            x[token] *= params.repetition_penalty ** (-1 if x[token] > 0 else 1)
    p = np.exp((x - x.max()) / params.temperature)
    p = p / p.sum()
    if params.top_k:
        kth = sorted(p, reverse=True)[: params.top_k][-1]
        p = np.array([v if v >= kth else 0 for v in p])  # equals of the k-th stay
    if params.top_p < 1:
        total, mass, smallest = p.sum(), 0.0, 0.0
        for value in sorted(p, reverse=True):
            mass, smallest = mass + value, value
            if mass >= params.top_p * total * (1 - 1e-9):
                break
        p = np.array([v if v >= smallest * (1 - 1e-9) else 0 for v in p])  # equals of the last one stay
    p = np.array([v if v >= params.min_p * p.max() * (1 - 1e-7) else 0 for v in p])
    return p / p.sum()


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_every_filter_against_brute_force(nn, options):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(13) * 1.5).astype(np.float32)
        seen = rng.random(13) < 0.4
        want = brute_force(logits, seen, **options)
        tokens = choose(nn, np.tile(logits, (len(GRID), 1)), GRID, np.tile(seen, (len(GRID), 1)), **options)
        got = np.bincount(tokens, minlength=13) / len(GRID)
        assert (got[want == 0] == 0).all(), "a token that was filtered out was drawn"
        assert np.abs(got - want).max() < 2 / len(GRID)  # the grid walks the whole distribution
        assert tokens == sorted(tokens)  # in vocabulary order


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_same_tokens_on_every_backend(options):
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((64, 97)) * 3).astype(np.float32)
    uniform, seen = rng.random(64, dtype=np.float32), rng.random((64, 97)) < 0.3
    tokens = [choose(get_backend(name), logits, uniform, seen, **options) for name in installed()]
    assert all(other == tokens[0] for other in tokens)


def test_the_filters_agree_with_transformers(nn):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits = np.random.default_rng(0).standard_normal(17).astype(np.float32) * 2
    for warper, options in (
        (transformers.TopKLogitsWarper(5), {"top_k": 5}),
        (transformers.TopPLogitsWarper(0.8), {"top_p": 0.8}),
        (transformers.MinPLogitsWarper(0.1), {"min_p": 0.1}),
    ):
        kept = warper(None, torch.tensor(logits)[None]).isfinite()[0]
        assert reachable(nn, logits, temperature=1.0, **options) == set(kept.nonzero().flatten().tolist())
    ids = torch.tensor([[1, 2, 2, 9]])
    penalised = transformers.RepetitionPenaltyLogitsProcessor(1.5)(ids, torch.tensor(logits)[None])
    seen = np.isin(np.arange(17), [1, 2, 9])[None]
    assert choose(nn, logits[None], [0], seen, repetition_penalty=1.5) == penalised.argmax(1).tolist()


def test_ties_are_treated_alike(nn):
    logits = [0, 2, 2, 1, 2, -5]
    assert reachable(nn, logits, temperature=1.0, top_k=2) == {1, 2, 4}
    assert reachable(nn, logits, temperature=1.0, top_p=0.1) == {1, 2, 4}
    assert reachable(nn, logits, temperature=1.0, min_p=1.0) == {1, 2, 4}
    assert choose(nn, np.float32([logits]), [0.99]) == [1], "greedy takes the first of equals"
    assert reachable(nn, [3.0] * 7, temperature=1.0, top_k=1) == set(range(7))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's word on differences of 6e38
def test_extreme_logits(nn):
    inf = np.inf
    assert choose(nn, np.float32([[-inf, 5, -inf]]), [0.999], temperature=1.0) == [1]
    assert reachable(nn, [-inf, 5, 5, -inf], temperature=1.0) == {1, 2}
    assert reachable(nn, [1e30, -1e30, 1e30], temperature=1.0, top_p=0.9) == {0, 2}
    assert reachable(nn, [3e38, -3e38], temperature=0.001) == {0}
    assert reachable(nn, [-1e5, -1e5 - 1, -2e5], temperature=1.0) == {0, 1}
    assert choose(nn, np.float32([[4.0]]), [0.5], temperature=1.0, top_k=1, top_p=0.5, min_p=0.5) == [0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on what is planted here
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_logits_that_are_not_finite_are_reported_row_by_row(nn, options):
    nan, inf = np.nan, np.inf
    logits = np.float32([[1, 2, 3], [1, nan, 3], [nan, 1, 1], [inf, 1, 1], [-inf] * 3, [1, 1, nan], [5, 1, -inf]])
    tokens = choose(nn, logits, [0.3] * 7, **options)
    assert [t < 0 for t in tokens] == [False, True, True, True, True, True, False]


def test_the_ends_of_the_uniform_range(nn):
    """0 takes the first possible token, and the largest float32 below 1 the last, never one behind it."""
    logits = np.random.default_rng(0).standard_normal((1, 5000)).astype(np.float32)
    logits[0, :7] = logits[0, -7:] = -np.inf
    last = float(np.nextafter(np.float32(1), np.float32(0)))
    assert choose(nn, logits, [0.0], temperature=1.0) == [7]
    assert 7 <= choose(nn, logits, [last], temperature=1.0)[0] < 4993
    assert choose(nn, logits[:, :10], [last], temperature=1.0) == [9]


def test_frequencies_follow_the_distribution(nn):
    """Chi-square over 20 000 draws of the source itself; 9 degrees of freedom, 99.9 per cent below 27.88."""
    logits = np.random.default_rng(1).standard_normal(10).astype(np.float32)
    source, draws = UniformSource(7, 200), 100
    uniform = np.concatenate([source.draw()[:, 0] for _ in range(draws)])
    tokens = choose(nn, np.tile(logits, (len(uniform), 1)), uniform, temperature=1.0)
    want = brute_force(logits, temperature=1.0) * len(uniform)
    statistic = ((np.bincount(tokens, minlength=10) - want) ** 2 / want).sum()
    assert statistic < 27.88


def test_uniform_numbers():
    def numbers(seed: int | None, batch: int) -> np.ndarray:
        source = UniformSource(seed, batch)
        return np.concatenate([source.draw() for _ in range(50)], 1)

    drawn = numbers(3, 4)
    assert drawn.dtype == np.float32
    assert drawn.shape == (4, 50)
    assert ((drawn >= 0) & (drawn < 1)).all()
    np.testing.assert_array_equal(drawn, numbers(3, 4))
    np.testing.assert_array_equal(drawn[:2], numbers(3, 2))  # a row does not depend on how many there are
    assert len(np.unique(drawn)) == drawn.size
    assert not np.array_equal(numbers(None, 1), numbers(None, 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 1e-5), ("temperature", float("nan")), ("temperature", "hot"),
        ("temperature", True), ("top_k", -1), ("top_k", 2.5), ("top_k", True), ("top_p", 0), ("top_p", 1.1),
        ("top_p", float("nan")), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")), ("repetition_penalty", None),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {value!r}; expected"):
        SamplingParams(**{field: value})


ALL_FILTERS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.mark.parametrize("options", [{"temperature": 1.0}, ALL_FILTERS], ids=["plain", "every filter"])
def test_one_seed_gives_the_same_text_on_every_backend(options):
    """200 tokens for a ragged batch of three."""
    prompts = [token_ids(1, length)[0].tolist() for length in (9, 1, 30)]
    results = []
    for name in installed():
        model = build(get_backend(name), config_of(n_layer=2))
        rows = model.generate(prompts, max_new_tokens=200, seed=11, **options)
        results.append([row.tokens for row in rows])
        assert all(len(row.tokens) == 200 and len(set(row.tokens)) > 20 for row in rows)
    assert all(other == results[0] for other in results)
    again = model.generate(prompts, max_new_tokens=200, seed=11, **options)
    assert [row.tokens for row in again] == results[0]
    other = model.generate(prompts, max_new_tokens=20, seed=12, **options)
    assert [row.tokens for row in other] != [row[:20] for row in results[0]]
