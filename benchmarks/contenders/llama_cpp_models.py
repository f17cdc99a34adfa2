"""llama.cpp through the low-level interface of llama-cpp-python, or a llama-bench binary named by LLAMA_BENCH.

Dimensions: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Job, Task, Unavailable, optional
from benchmarks.gguf_files import INSTALL, silent
from benchmarks.shapes import gguf_of, read_shape

BINARY = "LLAMA_BENCH"
"""The environment variable that names llama-bench, for a build of one's own."""


class LlamaCpp:
    """A model in a context of its own for each job.

    Args:
        folder: where :mod:`benchmarks.gguf_files` wrote.
        kind: type of the file, such as ``"Q8_0"``.
        threads: how many.
    """

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        self.api = optional("llama_cpp", INSTALL)
        path = gguf_of(folder, kind)
        if not path.exists():
            raise Unavailable(f"there is no {path.name}: pip install {INSTALL}")
        silent(self.api)
        self.api.llama_backend_init()
        self.file_bytes = path.stat().st_size
        self.threads = threads
        self.vocabulary = read_shape(folder)["vocab_size"]
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path.name}")
        self.context: Any = None

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """In batches of 2048 and micro-batches of 512, its defaults; head of the last position only."""
        self._open(1)
        rows = [(token, position, 0) for position, token in enumerate(ids.tolist())]
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            self._decode(part, wanted={len(part) - 1} if start + len(part) == len(rows) else set())
        return self._logits(-1).copy()

    def decoder(self, prompts: np.ndarray) -> Callable[[int], None]:
        """All rows in one batch, argmax in NumPy."""
        batch, length = prompts.shape
        self._open(batch)
        for t in range(length):
            self._decode([(int(prompts[row, t]), t, row) for row in range(batch)], wanted=set(range(batch)))
        position = [length]

        def step(count: int) -> None:
            for _ in range(count):
                tokens = [int(self._logits(row).argmax()) for row in range(batch)]
                rows = [(token, position[0], row) for row, token in enumerate(tokens)]
                self._decode(rows, wanted=set(range(batch)))
                position[0] += 1

        return step

    def parameter_bytes(self) -> int:
        """The size of the file."""
        return self.file_bytes

    def _open(self, batch: int) -> None:
        """An empty context for so many rows; the present one, emptied, when it fits."""
        if self.context is not None and self.rows == batch:
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = batch << 17
        params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, batch
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.rows = batch

    def _decode(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> None:
        """Read (token, position, sequence) rows; logits of those whose number is wanted."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}; expected 0")

    def _logits(self, row: int) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))


class LlamaBench:
    """The llama-bench binary that LLAMA_BENCH names: it times itself, in a process of its own at each run.

    Args:
        folder: where :mod:`benchmarks.gguf_files` wrote.
        kind: type of the file.
        threads: how many.
    """

    def __init__(self, folder: str, kind: str, threads: int) -> None:
        self.binary = os.environ.get(BINARY)
        if not self.binary:
            raise Unavailable(f"{BINARY} does not name a llama-bench binary")
        self.path = gguf_of(Path(folder), kind)
        if not self.path.exists():
            raise Unavailable(f"there is no {self.path.name}: pip install {INSTALL}")
        self.threads = threads

    def prepare(self, job: Job) -> Task:
        """A job of kind prefill, or of kind decode with a batch of one."""
        if job["kind"] == "prefill":
            work, parts = ["-p", str(job["length"]), "-n", "0"], job["length"]
        elif job["kind"] == "decode" and job["batch"] == 1:
            work, parts = ["-p", "0", "-n", str(job["steps"])], job["steps"]
        else:
            raise Unavailable("llama-bench prefills, and decodes one row")
        command = [str(self.binary), "-m", str(self.path), "-t", str(self.threads), "-r", "1", "-o", "json", *work]

        def run() -> float:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return float(json.loads(done.stdout)[0]["avg_ns"]) * 1e-9

        return Task(run, parts=parts)
