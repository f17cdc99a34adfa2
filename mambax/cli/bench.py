"""``mambax bench``: how fast a model reads and writes on this machine, on each backend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import mambax
from mambax.cli.terminal import note, size, stderr
from mambax.generation import GenerationMixin
from mambax.registry import backend_names, is_installed

SHAPE: dict[str, Any] = {"d_model": 768, "n_layer": 24, "vocab_size": 50280}
"""Of state-spaces/mamba-130m, which is measured with random weights when no model is named."""


@dataclass
class Measured:
    """A model on a backend, and the seconds that each round took it."""

    backend: str
    model: Any
    load_s: float
    read_s: list[float] = field(default_factory=list)
    write_s: list[float] = field(default_factory=list)

    def round(self, ids: np.ndarray, tokens: int) -> None:
        """Read the ids (L,), then write so many tokens more."""
        stream = self.model.generate_streaming(ids, max_new_tokens=tokens + 1, eos=())
        start = time.perf_counter()
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            continue
        self.read_s.append(first - start)
        self.write_s.append(time.perf_counter() - first)


def bench(
    name: str | None, backends: Sequence[str], prompt: int, tokens: int, rounds: int, options: dict[str, Any]
) -> None:
    """Print tokens per second, medians over rounds in which the backends take turns.

    With ``"mlx"`` among the backends named, also what its kernels for GPUs should reach on paper, and what the ops
    reach here.

    Args:
        name: a folder or a repository; None for random weights of the shape of mamba-130m, in float32.
        backends: their names; all that are installed when empty.
        prompt: tokens that are read.
        tokens: tokens that are written after them.
        rounds: how often each is measured, after one round that is not counted.
        options: of :func:`mambax.load`, but for the backend.

    Raises:
        ValueError: when a size is not at least 1, when the model does not write text, when an option is given that
            random weights do not have, and as :func:`mambax.load` does.
        ImportError, OSError: as :func:`mambax.load` does.
    """
    for what, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{what} is {value}; expected at least 1")
    found = [_open(name, backend, options) for backend in backends or filter(is_installed, backend_names())]
    ids = np.random.default_rng(0).integers(0, found[0].model.config.vocab_size, prompt)
    for number in range(rounds + 1):
        for measured in found:
            with stderr().status(f"round {number} of {rounds}: {measured.backend}"):
                measured.round(ids, tokens)
    _show(found, prompt, tokens)
    if "mlx" in backends:
        _show_kernels()


def _open(name: str | None, backend: str, options: dict[str, Any]) -> Measured:
    with stderr().status(f"loading on {backend}"):
        start = time.perf_counter()
        if name is None:
            given = [key for key, value in options.items() if value not in (None, False, "auto")]
            if given:
                raise ValueError(f"{given[0]} was given, but no model; name one, or leave {given[0]} out")
            model = mambax.from_config(mambax.MambaLMConfig(**SHAPE), backend=backend)
        else:
            model = mambax.load(name, backend=backend, **options)
        took = time.perf_counter() - start
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{name} is a {type(model).__name__}; expected a causal language model")
    return Measured(backend, model, took)


def _show(found: Sequence[Measured], prompt: int, tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = (
        "backend",
        "loaded in",
        f"reads {prompt}",
        f"writes {tokens}",
        "weights",
        "weights read while writing",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for measured in found:
        nn = measured.model.nn
        weights = sum(int(array.nbytes) for array in nn.parameters(measured.model).values())
        read, write = (statistics.median(times[1:]) for times in (measured.read_s, measured.write_s))
        table.add_row(
            f"{measured.backend} {nn.version()}",
            f"{measured.load_s:.1f} s",
            f"{prompt / read:,.0f} tokens/s",
            f"{tokens / write:,.1f} tokens/s",
            size(weights),
            f"{weights * tokens / write / 1e9:.1f} GB/s",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    note("Medians. Whatever else runs here makes them smaller.")


def _show_kernels() -> None:
    """The estimate of ``docs/gpu-kernels.md``, with a column for this machine."""
    from mambax_mlx.kernels import estimate, measured
    from rich.console import Console
    from rich.table import Table

    with stderr().status("timing the ops of the mlx backend"):
        rates = measured.rates()
    head, *rows = estimate.rows()
    table = Table(box=None, pad_edge=False)
    for name in [*head, "here"]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, estimate.two_digits(rates[row[0]] / 1e9))
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 100))
    console.print(
        "\nOps of the mlx backend, in 10^9 tokens times channels per second, bfloat16. On Apple's GPUs: by"
    )
    console.print("the bytes, exponentials and other operations of their kernels, on paper. Here: measured.\n")
    console.print(table)
