"""One model, many Python threads: each writes what it would write alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from harness import backend_params

import mambax
from mambax import MambaLMConfig

THREADS = 16
CONFIG = MambaLMConfig(d_model=256, n_layer=2, vocab_size=2000)
"""Large enough for its products, scans and convolutions to be cut up for several processors."""


class Job:
    """What a thread does over and over: prompts of lengths and options that no other thread has.

    Args:
        model: a language model.
        number: of the thread.
    """

    def __init__(self, model: Any, number: int) -> None:
        rng = np.random.default_rng(number)
        lengths = [1 + 16 * number, 3] if number % 3 == 0 else [1 + 16 * number]
        self.model = model
        self.prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]
        self.options: dict[str, Any] = {"max_new_tokens": 6, "eos": (), "prefill_chunk": 48 + number}
        if number % 2:
            self.options |= {"temperature": 0.9, "top_p": 0.95, "seed": number, "repetition_penalty": 1.1}

    def run(self) -> list[list[int]]:
        """The tokens of each prompt."""
        return [row.tokens for row in self.model.generate(self.prompts, **self.options)]


def together(model: Any, seconds: float) -> None:
    """All threads at once, for so long, each compared with itself alone."""
    jobs = [Job(model, number) for number in range(THREADS)]
    alone = [job.run() for job in jobs]
    rounds, different, failed = [0] * THREADS, [], []
    begin, end = threading.Barrier(THREADS), time.monotonic() + seconds

    def work(number: int) -> None:
        try:
            begin.wait()
            while rounds[number] == 0 or time.monotonic() < end:
                found = jobs[number].run()
                rounds[number] += 1
                if found != alone[number]:
                    different.append((number, found))
                    return
        except BaseException as error:
            failed.append(error)
            raise

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
    assert not different, f"thread {different[0][0]}: expected {alone[different[0][0]]}, found {different[0][1]}"
    assert min(rounds) > 0


@pytest.fixture(scope="module", params=backend_params(("numpy", "torch")))
def model(request: pytest.FixtureRequest) -> Any:
    """A model in host memory."""
    made = mambax.from_config(CONFIG, backend=request.param, seed=1)
    return made.cpu() if request.param == "torch" else made


def test_sixteen_threads_write_what_one_does(model: Any) -> None:
    together(model, 5)


@pytest.mark.slow
def test_sixteen_threads_for_a_minute(model: Any) -> None:
    together(model, 60)
