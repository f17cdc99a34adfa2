"""A world model: learn how a small world answers to actions, then imagine it, one action after the other.

    python examples/world_model.py runs/world

The world is two rooms with a door. Stepping on some cells opens the door, on others closes it; whether it is open
cannot be seen, only where one stands. So the next observation depends on what happened long ago, and the state of
the model has to keep it. At the end the model imagines walks that it has not seen: it is given the first cell and
the actions, and each cell that it predicts is its next input. All 32 walks of 256 moves are right, after 25 seconds
of one core; without memory, half of the moves at the door would be.

Dimensions: B batch, T moves, L = 2 T + 1 tokens: cell, action, cell, action, ..., cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mambax
from mambax.registry import default_backend
from mambax.training import Batch, Progress, Trainer, TrainingConfig

IGNORE = -100  # no target here: actions are chosen, not predicted
MAP = ("o.#.o", "..D..", "c.#.c")  # o opens the door D, c closes it, # is wall
CELLS = len(MAP) * len(MAP[0])
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left; tokens CELLS to CELLS + 3
FREE = [i for i in range(CELLS) if MAP[i // len(MAP[0])][i % len(MAP[0])] not in "#D"]


def walk(rng: np.random.Generator, moves: int) -> tuple[np.ndarray, np.ndarray]:
    """A walk at random, (2 T + 1,) tokens; and (T,) bool, the moves against the door, where memory is needed."""
    width, opened = len(MAP[0]), False
    cell = int(rng.choice(FREE))
    tokens, at_door = [cell], np.zeros(moves, bool)
    for step, action in enumerate(rng.integers(len(MOVES), size=moves).tolist()):
        here = MAP[cell // width][cell % width]
        opened = here == "o" or (opened and here != "c")
        row, column = cell // width + MOVES[action][0], cell % width + MOVES[action][1]
        if 0 <= row < len(MAP) and 0 <= column < width and MAP[row][column] != "#":
            at_door[step] = MAP[row][column] == "D"
            cell = row * width + column if opened or not at_door[step] else cell
        tokens += [CELLS + action, cell]
    return np.array(tokens), at_door


class Walks:
    """Batches of walks, a function of the seed and the step.

    Args:
        moves: T.
        batch_size: B.
        seed: of all walks; another seed gives other ones.
        count: how many batches are evaluated on.
    """

    carries_state = False
    bytes_per_token: float | None = None
    characters_per_token: float | None = None

    def __init__(self, moves: int, batch_size: int, *, seed: int, count: int = 1) -> None:
        self.moves, self.batch_size, self.seed, self.count = moves, batch_size, seed, count

    def batch(self, step: int) -> Batch:
        """The batch of a step: what is predicted at each action is the cell after it."""
        rng = np.random.default_rng([self.seed, step])
        tokens = np.stack([walk(rng, self.moves)[0] for _ in range(self.batch_size)])
        targets = tokens[:, 1:].copy()
        targets[:, ::2] = IGNORE
        return Batch(input_ids=tokens[:, :-1], shift_labels=targets)

    def batches(self) -> Iterator[Batch]:
        """The first ``count``."""
        return map(self.batch, range(self.count))

    def fingerprint(self) -> str:
        """What decides the batches."""
        return f"walks {self.moves} {self.batch_size} {self.seed}"


def imagine(model: Any, first: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The cells (B, T) that a model expects from first cells (B,) on under actions (B, T), from its state alone."""
    nn, cells = model.nn, []
    with nn.no_grad():
        state, cell = None, first
        for action in actions.T:
            output = model(np.stack([cell, action], axis=1), state)  # two tokens, whatever came before
            state = output.state
            cell = np.argmax(nn.to_numpy(output.logits)[:, -1, :CELLS], axis=-1)
            cells.append(cell)
    return np.stack(cells, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder for the model and all about it")
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="walks of a step")
    parser.add_argument("--moves", type=int, default=64, help="of a walk to learn from")
    parser.add_argument("--imagined", type=int, default=256, help="moves of an imagined walk")
    parser.add_argument("--d-model", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = mambax.MambaLMConfig(d_model=args.d_model, n_layer=args.layers, vocab_size=CELLS + len(MOVES))
    model = mambax.from_config(config, backend=args.backend, seed=args.seed)
    training = TrainingConfig(
        steps=args.steps, batch_size=args.batch, learning_rate=args.lr, min_ratio=0.0, weight_decay=0.0,
        eval_every=100, seed=args.seed,
    )  # fmt: skip
    data = Walks(args.moves, args.batch, seed=args.seed)
    validation = Walks(args.moves, args.batch, seed=args.seed + 1, count=4)
    trainer = Trainer(model, data, training, args.run, validation=validation, observers=[Progress(50)])
    summary = trainer.train()
    if summary.model is None or summary.best is None:
        raise SystemExit("interrupted")
    print(f"one move ahead: {summary.best.accuracy:.2%} right")

    rng = np.random.default_rng(args.seed + 2)
    walks, at_door = map(np.stack, zip(*(walk(rng, args.imagined) for _ in range(32)), strict=True))
    real = walks[:, 2::2]
    got = imagine(mambax.load(summary.model, backend=args.backend), walks[:, 0], walks[:, 1::2])
    alike = got == real
    passed = (real != walks[:, :-2:2])[at_door].mean()
    whole = alike.all(axis=1).mean()
    print(f"imagined over {args.imagined} moves: {alike.mean():.2%} of the cells right, {whole:.0%} of the walks")
    print(f"at the door: {alike[at_door].mean():.2%} right; without memory {max(passed, 1 - passed):.2%}")


if __name__ == "__main__":
    main()
