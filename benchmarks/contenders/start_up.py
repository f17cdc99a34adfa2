"""From the start of a Python process to the first token of a model, with the files in the page cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.contender import Job, Task, Unavailable
from benchmarks.shapes import folder_of, gguf_of

_MAMBAX = """
import mambax
model = mambax.load(PATH, backend=BACKEND, device="cpu")
next(iter(model.generate_streaming(PROMPT, max_new_tokens=2, eos=())))
"""
_TRANSFORMERS = """
import torch, transformers
model = transformers.MambaForCausalLM.from_pretrained(PATH).eval()
model.generate(torch.tensor([[11, 12, 13, 14]]), max_new_tokens=1, do_sample=False)
"""
_MLX_LM = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from pathlib import Path
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
model, _ = load_model(Path(PATH))
next(generate_step(mx.array([11, 12, 13, 14]), model, max_tokens=2))
"""
_LLAMA_CPP = """
import llama_cpp
model = llama_cpp.Llama(PATH, n_ctx=512, n_threads=THREADS, verbose=False)
model.eval([11, 12, 13, 14])
model.sample(temp=0.0)
"""
SCRIPTS = {"mambax": _MAMBAX, "transformers": _TRANSFORMERS, "mlx-lm": _MLX_LM, "llama.cpp": _LLAMA_CPP}

_END = """
print("first token", flush=True)
from benchmarks.memory import peak
print(peak(), flush=True)
"""


class StartUp:
    """A script that loads a model and produces one token, run in a new process each time.

    Args:
        package: a name of :data:`SCRIPTS`.
        folder: what :mod:`benchmarks.weights` wrote.
        threads: how many.
        backend: of mambax.
        dtype: of the weights.
        length: tokens of the prompt, of mambax.
        cold: whether mambax finds no compiled kernels.
    """

    def __init__(
        self,
        package: str,
        folder: str,
        threads: int,
        backend: str = "numpy",
        dtype: str = "float32",
        length: int = 4,
        cold: bool = False,
    ) -> None:
        if package == "llama.cpp":
            path = gguf_of(Path(folder), {"float32": "F32", "bfloat16": "BF16"}[dtype])
        else:
            path = folder_of(Path(folder), dtype)
        if not path.exists():
            raise Unavailable(f"there is no {path.name}: pip install llama-cpp-python gguf")
        self.cold, prompt = cold, list(range(11, 11 + length))
        values = f"PATH, BACKEND, THREADS, PROMPT = {str(path)!r}, {backend!r}, {threads}, {prompt}\n"
        self.script = values + SCRIPTS[package] + _END
        self.weights = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())

    def prepare(self, job: Job) -> Task:
        """A job of kind start-up; its warm-up brings the files into the page cache and compiles what is cached."""
        peaks: list[int] = []

        def run() -> float:
            with TemporaryDirectory() as empty:
                environment = os.environ | ({"MAMBAX_CACHE_DIR": empty} if self.cold else {})
                command = [sys.executable, "-c", self.script]
                start = time.perf_counter()
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                    assert process.stdout is not None
                    found = any(line.strip() == "first token" for line in process.stdout)
                    took = time.perf_counter() - start
                    rest = process.stdout.read().strip()
            if process.returncode or not found:
                raise RuntimeError(f"the script ended with status {process.returncode}")
            peaks.append(int(rest))
            return took

        return Task(run, check=lambda: {"peak": max(peaks), "weights": self.weights})
