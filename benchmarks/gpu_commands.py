"""Parts of the GPU benchmark that run other programs: the tests, compute-sanitizer, compiling the peers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import gpu_peers, gpu_ssd
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.gpu_rivals import FAILURES
from benchmarks.harness import Case, Entry, summary
from benchmarks.processes import ROOT
from benchmarks.processes import environment as quiet

NATIVE = ("test_triton_*.py", "test_graph_*.py", "test_decode_graph.py", "test_cuda_*.py")
"""Test files of the kernels, and of what is made of them."""

ELSEWHERE = ("test_triton_compiles.py", "test_graph_limits.py", "test_cuda_rehearsal.py")
"""Those of them that are for machines without a GPU."""

WATCHED = (
    "test_triton_conv.py::test_outputs_state_and_every_gradient[mask-33-3-20]",
    "test_triton_conv.py::test_outputs_state_and_every_gradient[boundaries-2-2-130]",
    "test_triton_norm.py::test_outputs_and_every_gradient[shape2-bfloat16-float32]",
    "test_triton_step.py::test_convolution[300-4]",
    "test_triton_step.py::test_scan[70-5]",
    "test_graph_step.py::test_few_rows_in_two_launches[4-3]",
    "test_triton_scan.py::test_results_and_gradients[sizes3-mask]",
    "test_triton_scan.py::test_results_and_gradients[sizes4-boundaries]",
    "test_triton_native.py::test_scan[boundaries-sizes0-float32]",
    "test_triton_ssd.py::test_results_and_gradients[sizes4-mask]",
    "test_triton_native.py::test_ssd[boundaries-sizes0-bfloat16]",
    "test_cuda_quantized.py::test_products[bfloat16-1-int4-32]",
    "test_cuda_quantized.py::test_products[bfloat16-65-int8-32]",
)
"""A test of each kernel, for compute-sanitizer, under which everything takes ten times as long and more."""

WORKERS = 8
"""Processes that share the tests where pytest-xdist is: most of their time is spent compiling kernels."""

NVIDIA_PROGRAMS = os.pathsep.join(("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"))
"""Where they are when the path does not say so."""

HANGING_S = 100
"""Seconds after which a test is given up."""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a child process, in which mambax can be imported from its source tree as it is.

    Where mambax is not installed, `folder` gets the metadata that says which backends there are.
    """
    found = quiet(os.cpu_count() or 1)
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, [*_paths(folder), found.get("PYTHONPATH", "")]))}


def use_source_tree(folder: Path) -> None:
    """Let this process, and those that it starts, import mambax as those of :func:`environment` can."""
    added = [path for path in _paths(folder) if path not in sys.path]
    sys.path += added
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*added, os.environ.get("PYTHONPATH", "")]))


def _paths(folder: Path) -> list[str]:
    try:
        importlib.metadata.distribution("mambax")
    except importlib.metadata.PackageNotFoundError:
        _write_metadata(folder / "mambax-0.dist-info")
        return [str(ROOT), str(ROOT / "backends"), str(folder)]
    return [str(ROOT), str(ROOT / "backends")]


def _write_metadata(folder: Path) -> None:
    """What an installation would leave of pyproject.toml: the name, and the backends."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r'\[project\.entry-points\."mambax\.backends"\]\n(.*?)\n\n', text, re.DOTALL)
    if section is None:
        raise ValueError("pyproject.toml: expected the entry points of mambax.backends, found none")
    folder.mkdir(parents=True, exist_ok=True)
    entries = section[1].replace('"', "")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mambax\nVersion: 0\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text(f"[mambax.backends]\n{entries}\n", encoding="utf-8")


def finished(
    command: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """A command that has ended, with what it said; one that takes too long is ended with all that it started.

    What it started would otherwise hold its output open, and be waited for.

    Raises:
        subprocess.TimeoutExpired: when it took longer than `timeout` seconds.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
    ) as process:
        try:
            said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with suppress(psutil.NoSuchProcess):
                for other in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        other.kill()
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def run(label: str, command: Sequence[str], timeout: float, **variables: str) -> Entry:
    """The outcome of a command: what it said last when it fails, and pytest's counts among the figures."""
    entry = Entry(label)
    start = time.perf_counter()
    try:
        done = finished(command, timeout, {**os.environ, **variables})
    except subprocess.TimeoutExpired:
        entry.status, entry.reason = "failed", f"stopped after {timeout:.0f} s"
        return entry
    except OSError as error:
        entry.status, entry.reason = "skipped", f"cannot be run: {error}"
        return entry
    entry.seconds = summary([time.perf_counter() - start])
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    counts = {
        word: float(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped)", lines[-1] if lines else "")
    }
    entry.figures = counts
    if done.returncode:
        told = [line for line in lines if line.startswith(("FAILED", "ERROR", "========= "))] or lines[-1:]
        entry.status, entry.reason = "failed", f"status {done.returncode}: {' | '.join(told)[:600]}"
    return entry


def _pytest(*arguments: str, workers: int = 0) -> list[str]:
    """pytest with these arguments, in so many processes if it can: two tests that hang must not cost all others."""
    shared = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    limit = ["-o", f"timeout={HANGING_S}", "-o", "timeout_method=thread"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *limit, *shared, *arguments]


def native_suites() -> list[str]:
    """Every test file of the kernels, and of what is made of them."""
    found = sorted({path.name for pattern in NATIVE for path in (ROOT / "tests").glob(pattern)})
    return [f"tests/{name}" for name in found if name not in ELSEWHERE]


def _files_with_gpu_tests() -> list[str]:
    """Test files that have tests for a GPU alone; collecting all the others takes long and may fail."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def tests(c: Context) -> Iterator[Case]:
    """The suites of the kernels, natively, and the tests that need a GPU: a case for each run of pytest."""
    if c.plan.device != "cuda":
        runs = {"the kernels' suites": _pytest("--collect-only", "tests/test_triton_step.py")}
    else:
        runs = {
            "the kernels' suites": _pytest("-m", "not gpu", *native_suites(), workers=WORKERS),
            "the suite of every scan": _pytest("tests/test_scan.py", "-k", "triton"),
            "pytest -m gpu": _pytest("-m", "gpu", *_files_with_gpu_tests()),
        }
    for name, command in runs.items():
        yield Case("tests", {"kind": "tests"}, [run(f"mambax: {name}", command, c.arena.left())])


def sanitizer(c: Context) -> Iterator[Case]:
    """compute-sanitizer over tests of the kernels at small sizes: accesses out of bounds, and races."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=NVIDIA_PROGRAMS)
    for check, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        label = f"mambax: {check}"
        if tool is None or c.plan.device != "cuda":
            reason = "there is no compute-sanitizer here" if tool is None else "a dry run has no GPU"
            entry = Entry(label, "skipped", reason)
        else:
            watch = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
            command = [*watch, *_pytest(*(f"tests/{test}" for test in WATCHED))]
            # torch's allocator would hide accesses beyond a tensor
            entry = run(label, command, share * c.arena.left(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        yield Case("sanitizer", {"kind": "tests"}, [entry])


def peers(c: Context) -> Iterator[Case]:
    """Compile the peers side by side, so that no other part waits for it.

    mamba_ssm tries every layout of its Triton kernels, of which there are hundreds, before it runs them once.
    """
    if c.peers is not None:
        for package in gpu_peers.PACKAGES:
            with suppress(Unavailable):  # said by what is to be compiled
                gpu_peers.unpacked(c.peers, package)
    made: dict[str, Callable[[], Any]] = {name: partial(_build, c, name) for name in gpu_peers.EXTENSIONS}
    made["mamba_ssm's Triton kernels"] = partial(_run_once, c)
    with ThreadPoolExecutor(len(made)) as pool:
        entries = list(pool.map(_made, made, made.values()))
    yield Case("peers", {"kind": "build"}, entries)


def _build(c: Context, name: str) -> None:
    if c.peers is None:
        gpu_peers.load(name, folder=None)
    else:
        gpu_peers.build(c.peers, name)


def _run_once(c: Context) -> None:
    """mamba_ssm's scan of Mamba-2, forwards and backwards, in the first of the sizes that are compared."""
    given = gpu_ssd.inputs(c, c.plan.batches[0], c.plan.ssd_lengths[0], next(iter(c.plan.ssd.values())))
    gpu_ssd.made(gpu_ssd.MAKERS["mamba_ssm Triton"], c, given, backward=True)()()


def _made(label: str, make: Callable[[], Any]) -> Entry:
    entry = Entry(label)
    start = time.perf_counter()
    try:
        make()
        entry.seconds = summary([time.perf_counter() - start])
    except Unavailable as reason:
        entry.status, entry.reason = "skipped", str(reason)
    except FAILURES as error:
        entry.status, entry.reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return entry
