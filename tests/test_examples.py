"""The examples, in runs of seconds: what they make, what they say, and that their tasks are what they say.

The demo, the chat and the fine-tuning have tests of their own.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from harness import WITH_GRADIENTS, backend_params, run
from tolerances import assert_close
from training_runs import TEXT

import mambax
from mambax.training import Stream, TrainingConfig, corpus, write_tokens
from mambax.training.engine import make_engine

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tinyshakespeare"
TRAINED = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
Example = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    """An example by its name, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture
def say(
    example: Example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example with arguments; what it prints."""

    def called(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        example(name).main()
        return capsys.readouterr().out

    return called


# --- from characters to text -------------------------------------------------------------------------------------


@TRAINED
def test_a_language_model_from_a_text(say, tmp_path, backend):
    tokenizer, size = {"torch": ("characters", 30), "mlx": ("bpe", 260)}[backend]
    (tmp_path / "text.txt").write_text(TEXT * 3, "utf-8", newline="\n")
    small = ["--steps", 2, "--d-model", 8, "--layers", 1, "--batch", 2, "--length", 8, "--vocab", 260]
    command = [tmp_path / "text.txt", tmp_path / "run", "--backend", backend, "--tokenizer", tokenizer, *small]
    said = say("train_lm", *command)
    assert re.search(r"held-out text: \d\.\d{3} nats per character\n.", said, re.DOTALL)
    assert say("train_lm", *command, "--resume") == said  # it was at its end, and says the same of it
    made = mambax.load(tmp_path / "run" / "model", backend="numpy")
    assert made.config.vocab_size == made.tokenizer.vocab_size
    assert abs(made.config.vocab_size - size) <= 2
    assert (tmp_path / "run" / "log.csv").is_file()


def test_the_shipped_model_is_what_its_card_says(tmp_path):
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    model = mambax.load(MODEL, backend="numpy")
    count = sum(array.size for array in model.nn.parameters(model).values())
    assert f"{count:,} parameters" in card
    assert count <= 2_000_000
    (source,) = corpus.sources([ROOT / "examples" / "data" / "tinyshakespeare.txt"])
    assert isinstance(source, corpus.TextFile)
    first, last = corpus.split_file(source, 0.1)
    for part in (first, last):
        assert f"{sum(map(len, part.blocks())):,} characters" in card
    held_out = write_tokens([last.blocks()], model.tokenizer, tmp_path / "held-out")
    nats, state = 0.0, None
    for batch in Stream(held_out, 4096).batches():
        output = model(batch.input_ids, state, shift_labels=batch.shift_labels)
        state = output.state
        nats += float(output.loss) * batch.items
    per_character = nats / (len(held_out) - 1) * len(held_out) / held_out.characters
    assert f"**{per_character:.3f} nats per character**" in card
    assert per_character <= 1.50


# --- the tasks of the paper --------------------------------------------------------------------------------------


def test_rows_of_selective_copying(example):
    task = example("synthetic").SelectiveCopying(20, 5, 7)
    ids, targets = task.rows(np.random.default_rng(0), 200)
    assert ids.shape == targets.shape == (200, 25)
    for row, wanted in zip(ids, targets, strict=True):
        kept = [token for token in row[:20] if token < 7]
        assert len(kept) == 5
        assert (row[20:] == 8).all()
        assert wanted.tolist() == [-100] * 20 + kept
    assert ((ids[:, :20] < 7).mean(0) > 0.1).all()  # they stand anywhere
    assert set(ids[ids < 7].tolist()) == set(range(7))


def test_rows_of_induction_heads(example):
    task = example("synthetic").InductionHeads(12, 6)
    ids, targets = task.rows(np.random.default_rng(0), 200)
    places = set()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert row.count(6) == 2
        assert row[-1] == 6
        assert wanted == [-100] * 11 + [row[row.index(6) + 1]]
        places.add(row.index(6))
    assert places == set(range(10))


def test_rows_of_a_step_are_the_same_again_and_others_elsewhere(example):
    made = example("synthetic")
    tasks = [made.InductionHeads(8, 4), made.InductionHeads(16, 4)]
    data, other = made.Drawn(tasks, 64, seed=0), made.Drawn(tasks, 64, seed=1)
    assert [data.batch(step).input_ids.shape for step in range(3)] == [(8, 8), (4, 16), (8, 8)]
    assert np.array_equal(data.batch(2).input_ids, data.batch(2).input_ids)
    assert not np.array_equal(data.batch(2).input_ids, data.batch(0).input_ids)
    assert not np.array_equal(data.batch(2).input_ids, other.batch(2).input_ids)


@TRAINED
def test_without_selection_the_system_does_not_look_at_its_input(example, backend):
    model = mambax.from_config(mambax.MambaLMConfig(d_model=8, n_layer=2, vocab_size=6), backend=backend)
    nn, x = model.nn, np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    mixer = model.backbone.layers[0].mixer

    def chosen() -> np.ndarray:
        return nn.to_numpy(mixer.x_proj(nn.from_numpy(x)))[0]

    with nn.no_grad():
        assert np.ptp(chosen(), axis=0).min() > 0.01
    example("synthetic").make_time_invariant(model)
    before = nn.to_numpy(mixer.x_proj.bias).copy()
    engine = make_engine(model, TrainingConfig(steps=2))
    batch = example("synthetic").Drawn([example("synthetic").InductionHeads(9, 5)], 36, seed=0).batch(0)
    engine.accumulate(batch, batch.items, None)
    engine.update(0.1)
    with nn.no_grad():
        assert np.ptp(chosen(), axis=0).max() == 0  # also after it has learnt something
    assert not np.array_equal(nn.to_numpy(mixer.x_proj.bias), before)


@TRAINED
@pytest.mark.parametrize("name", ["classify", "induction"])
def test_tasks_are_learnt_from(say, tmp_path, backend, name):
    small = ["--d-model", 8, "--layers", 1, "--batch", 4, "--length", 16, "--steps", 2, "--backend", backend]
    said = say(name, *small, "--save", tmp_path / "model")
    assert re.search(r"step 2: loss \d\.\d{4}, held-out rows [\d.]+% right", said)
    assert re.search(r"16: [\d.]+% right; by chance 6\.25%" if name == "classify" else r"64 tokens: [\d.]+%", said)
    assert mambax.load(tmp_path / "model", backend="numpy").config.d_model == 8
    assert "by chance" in say(name, *small, "--time-invariant")
    with pytest.raises(SystemExit, match="no layout of files"):
        say(name, *small, "--time-invariant", "--save", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@TRAINED
def test_an_easy_task_is_solved(say, backend):
    small = ["--values", 2, "--kept", 1, "--length", 4, "--d-model", 16, "--layers", 1, "--batch", 32]
    said = say("classify", *small, "--steps", 60, "--lr", 0.02, "--backend", backend)
    assert float(re.findall(r"([\d.]+)% right", said)[-1]) > 99


# --- features ----------------------------------------------------------------------------------------------------


def test_passages_have_the_same_words(example):
    words = [f"w{i}" for i in range(50)]
    texts, labels = example("features").passages("\n".join(words), 12, np.random.default_rng(0))
    assert len(texts) == 8
    assert labels.tolist() == [0, 1] * 4
    for i in range(0, 8, 2):
        assert texts[i].split() == words[6 * i : 6 * i + 12]
        assert texts[i + 1] != texts[i]
        assert sorted(texts[i + 1].split()) == sorted(texts[i].split())


def test_a_probe_finds_what_is_linear_and_nothing_else(example):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5)) * [1, 10, 1, 1, 1] + 3
    labels = (x[:, 0] + x[:, 1] / 10 > 3.3).astype(np.int64)
    probe = example("features").probe
    assert (probe(x[:200], labels[:200], x[200:], 1e-3) == labels[200:]).mean() > 0.9
    assert 0.3 < (probe(x[:200], rng.integers(2, size=200), x[200:], 1e-3) == labels[200:]).mean() < 0.7


def test_features_of_a_batch_are_those_of_each(example):
    model = mambax.load(MODEL, backend="numpy")
    texts = [" to be or not", " that is the question", " ay"]
    for pooling in ("mean", "last", "state"):
        got = example("features").features(model, pooling, texts, 2)
        assert_close(got, np.concatenate([example("features").features(model, pooling, [text]) for text in texts]))


@pytest.mark.parametrize("backend", backend_params())
def test_features_know_the_order_of_words(say, backend):
    text = ROOT / "examples" / "data" / "tinyshakespeare.txt"
    said = say("features", text, "--model", MODEL, "--backend", backend, "--passages", 60)
    right = dict(re.findall(r"(.*): \d+ features, ([\d.]+)% right", said))
    assert right["bag of embeddings"] == "50.0"
    assert float(right["pooling 'mean'"]) > 60
    assert float(right["pooling 'state'"]) > 60


# --- a world model -----------------------------------------------------------------------------------------------


def test_walks_follow_the_map(example):
    world = example("world_model")
    cells, width, rng = "".join(world.MAP), len(world.MAP[0]), np.random.default_rng(0)
    for _ in range(30):
        tokens, at_door = world.walk(rng, 200)
        assert tokens.shape == (401,)
        opened = False
        for step in range(200):
            here, action, after = tokens[2 * step : 2 * step + 3].tolist()
            opened = {"o": True, "c": False}.get(cells[here], opened)
            move = world.MOVES[action - len(cells)]
            row, column = here // width + move[0], here % width + move[1]
            inside = 0 <= row < len(world.MAP) and 0 <= column < width
            there = row * width + column if inside else here
            assert at_door[step] == (inside and cells[there] == "D")
            free = cells[there] != "#" and (cells[there] != "D" or opened)
            assert after == (there if free else here)


def test_only_cells_are_predicted(example):
    world = example("world_model")
    batch = world.Walks(6, 3, seed=0).batch(4)
    assert batch.input_ids.shape == (3, 12)
    assert (np.asarray(batch.shift_labels)[:, ::2] == -100).all()
    assert np.array_equal(np.asarray(batch.shift_labels)[:, 1:-1:2], batch.input_ids[:, 2::2])


@pytest.mark.parametrize("backend", backend_params())
def test_an_imagined_walk_is_what_the_whole_of_it_gives(example, backend):
    world = example("world_model")
    config: dict[str, Any] = {"d_model": 8, "n_layer": 2, "vocab_size": world.CELLS + 4}
    model = mambax.from_config(mambax.MambaLMConfig(**config), backend=backend, seed=0)
    rng = np.random.default_rng(0)
    first, actions = rng.choice(world.FREE, 3), rng.integers(4, size=(3, 7)) + world.CELLS
    cells = world.imagine(model, first, actions)
    tokens = np.stack([np.concatenate([first[:, None], cells[:, :-1]], axis=1), actions], axis=2).reshape(3, 14)
    logits = run(model, tokens)[0][:, 1::2, : world.CELLS]
    assert np.array_equal(cells, logits.argmax(-1))


@TRAINED
def test_a_world_is_learnt_and_imagined(say, tmp_path, backend):
    small = ["--d-model", 8, "--layers", 1, "--batch", 4, "--moves", 6, "--imagined", 9, "--steps", 2]
    said = say("world_model", tmp_path / "run", *small, "--backend", backend)
    assert re.search(r"one move ahead: [\d.]+% right", said)
    assert re.search(r"imagined over 9 moves: [\d.]+% of the cells right, \d+% of the walks", said)
    assert re.search(r"at the door: ([\d.]+|nan)% right; without memory", said)
