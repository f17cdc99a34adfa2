"""Two tasks of the Mamba paper that need a state which chooses what it keeps, and what solves them or does not.

Both are made from random numbers, a function of the seed and the step, so that there is no data to keep and no row
is seen twice. ``classify.py`` and ``induction.py`` run them.

Dimensions: B batch, L length, M tokens to keep, V values, D d_inner, N d_state, R dt_rank.

Source: Gu and Dao 2023, section 4.1 and figure 2; induction heads as of Fu et al. 2023 ("Hungry Hungry Hippos").
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import mambax
from mambax.adapters import freeze
from mambax.init import Initializer
from mambax.registry import default_backend
from mambax.training import Batch, TrainingConfig, evaluate
from mambax.training.engine import Engine, make_engine

IGNORE = -100  # no target here


class Rows(Protocol):
    """Makes rows of a task."""

    length: int
    vocab_size: int

    def rows(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` rows and the target at each of their positions, IGNORE for none; both (count, ...) int64."""
        ...


class SelectiveCopying:
    """M tokens at random places among noise; after the noise, each again, in order.

    A system that does not look at its input cannot know at which distance each token will be.

    Args:
        length: L, of the tokens and the noise together.
        kept: M.
        values: V, kinds of token. V is the noise and V + 1 asks for the next answer.
    """

    def __init__(self, length: int, kept: int, values: int) -> None:
        self.length, self.kept, self.values, self.vocab_size = length, kept, values, values + 2

    def rows(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count, L + M) tokens, and their targets: of the last M positions."""
        tokens = rng.integers(self.values, size=(count, self.kept))
        places = np.sort(rng.permuted(np.tile(np.arange(self.length), (count, 1)), axis=1)[:, : self.kept], axis=1)
        ids = np.full((count, self.length + self.kept), self.values)
        np.put_along_axis(ids, places, tokens, axis=1)
        ids[:, self.length :] = self.values + 1
        targets = np.full_like(ids, IGNORE)
        targets[:, self.length :] = tokens
        return ids, targets


class InductionHeads:
    """One token is special. What followed it is the answer when it comes again, at the end.

    Args:
        length: L.
        values: V, kinds of token; V is the special one.
    """

    def __init__(self, length: int, values: int) -> None:
        self.length, self.values, self.vocab_size = length, values, values + 1

    def rows(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count, L) tokens, and their targets: of the last position."""
        ids = rng.integers(self.values, size=(count, self.length))
        place = rng.integers(self.length - 2, size=count)
        every = np.arange(count)
        ids[every, place] = ids[:, -1] = self.values
        targets = np.full_like(ids, IGNORE)
        targets[:, -1] = ids[every, place + 1]
        return ids, targets


class Drawn:
    """Batches of a task, to train on; or ``count`` of them, to evaluate on.

    Args:
        tasks: the task, or several that take turns.
        tokens: of a batch; so many that short rows have as many tokens in all as long ones.
        seed: of all rows; another seed gives other rows.
        count: how many batches are evaluated on.
    """

    carries_state = False
    bytes_per_token: float | None = None
    characters_per_token: float | None = None

    def __init__(self, tasks: Sequence[Rows], tokens: int, *, seed: int, count: int = 1) -> None:
        self.tasks, self.tokens, self.seed, self.count = tasks, tokens, seed, count

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        task = self.tasks[step % len(self.tasks)]
        rng = np.random.default_rng([self.seed, step])
        ids, targets = task.rows(rng, max(1, self.tokens // task.length))
        return Batch(input_ids=ids, shift_labels=targets)

    def batches(self) -> Iterator[Batch]:
        """The first ``count``."""
        return map(self.batch, range(self.count))


def make_time_invariant(model: Any) -> None:
    """Replace what makes a Mamba selective: delta, B and C become parameters that do not depend on the input.

    ``x_proj`` gives its bias alone, (R + 2N,), which is learnt; the rest of the block, its convolution and its
    gate, stays. The paper's table 1 has it as the layer S4 in the architecture Mamba.
    """
    nn, init, config = model.nn, Initializer(0), model.config
    size = int(config.dt_rank) + 2 * config.d_state
    for layer in model.backbone.layers:
        bias = init.normal((size,), 1.0)
        layer.mixer.x_proj = nn.Linear(init.full((size, config.d_inner), 0.0), bias)
    freeze(model, "*.x_proj.weight")


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that both tasks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--backend", default=default_backend())
    made.add_argument("--time-invariant", action="store_true", help="without selection, which cannot solve it")
    made.add_argument("--save", type=Path, help="folder for the model")
    options = {"values": 16, "d_model": 64, "layers": 2, "batch": 64, "lr": 3e-3, "seed": 0, "every": 100}
    for name, value in {**options, **defaults}.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    return made


def fit(args: argparse.Namespace, tasks: Sequence[Rows], tested: Rows) -> Engine:
    """Train a model on tasks that take turns, with the options of :func:`parser`.

    The loop is that of :class:`mambax.training.Trainer` in short: rows that are made as they are needed leave
    nothing to keep but the model.

    Returns:
        The engine, which holds the trained model.
    """
    if args.time_invariant and args.save:
        raise SystemExit("--save: a model without selection has no layout of files; leave out one of the options")
    config = mambax.MambaLMConfig(d_model=args.d_model, n_layer=args.layers, vocab_size=tested.vocab_size)
    model = mambax.from_config(config, backend=args.backend, seed=args.seed)
    if args.time_invariant:
        make_time_invariant(model)
    training = TrainingConfig(
        steps=args.steps, batch_size=args.batch, learning_rate=args.lr, min_ratio=0.0, weight_decay=0.0
    )
    engine, rate = make_engine(model, training), training.make_schedule()
    data = Drawn(tasks, args.batch * tested.length, seed=args.seed)
    began = time.perf_counter()
    for step in range(args.steps):
        batch = data.batch(step)
        loss = engine.accumulate(batch, batch.items, None).loss
        engine.clip_gradients(training.clip_norm)
        engine.update(rate(step))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            right = accuracy(engine, tested, seed=args.seed + 1, count=4)
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: loss {loss:.4f}, held-out rows {right:.2%} right, {seconds:.0f} s", flush=True)
    if args.save:
        mambax.save_pretrained(model, args.save)
    return engine


def accuracy(engine: Engine, task: Rows, *, seed: int, rows: int = 32, count: int = 16) -> float:
    """Of the answers of a model, the part that is right; rows of another seed are rows that it has not seen."""
    return evaluate(engine, Drawn([task], rows * task.length, seed=seed, count=count)).accuracy or 0.0
