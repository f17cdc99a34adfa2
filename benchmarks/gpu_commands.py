"""Parts of the GPU benchmark that run other programs: the tests, compute-sanitizer, compiling the peers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import gpu_peers
from benchmarks.contender import Unavailable
from benchmarks.gpu_context import Context
from benchmarks.harness import Case, Entry, summary
from benchmarks.processes import ROOT
from benchmarks.processes import environment as quiet

KERNEL_TESTS = tuple(f"test_triton_{name}.py" for name in ("conv", "norm", "step", "scan", "ssd"))
SMALL = "outputs or gradient or convolution or scan"
"""The tests of the kernels that compute-sanitizer watches, as pytest's -k wants it."""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a child process, in which mambax can be imported from its source tree as it is.

    Where mambax is not installed, `folder` gets the metadata that says which backends there are.
    """
    found = quiet(os.cpu_count() or 1)
    paths = [str(ROOT), str(ROOT / "backends"), found.get("PYTHONPATH", "")]
    try:
        importlib.metadata.distribution("mambax")
    except importlib.metadata.PackageNotFoundError:
        _write_metadata(folder / "mambax-0.dist-info")
        paths.append(str(folder))
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


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


def run(label: str, command: Sequence[str], timeout: float, **variables: str) -> Entry:
    """The outcome of a command: what it said last when it fails, and pytest's counts among the figures."""
    entry = Entry(label)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=timeout,
            check=False, encoding="utf-8", errors="replace",
        )  # fmt: skip
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


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _kernel_tests() -> list[str]:
    return [f"tests/{name}" for name in KERNEL_TESTS if (ROOT / "tests" / name).exists()]


def _native_suites() -> list[str]:
    """Every test file of the kernels, and of what is made of them."""
    found = sorted(path.name for path in (ROOT / "tests").glob("test_triton_*.py"))
    others = ("test_graph_step.py", "test_decode_graph.py", "test_cuda_quantized.py")
    return [f"tests/{name}" for name in (*found, *others) if name != "test_triton_compiles.py"]


def tests(c: Context) -> Iterator[Case]:
    """The tests that need a GPU, and the suites of the kernels, natively."""
    limit = c.arena.pace.part_s
    if c.plan.device != "cuda":
        commands = {"the kernels' suites": _pytest("--collect-only", "tests/test_triton_step.py")}
    else:
        commands = {
            "the kernels' suites": _pytest(*_native_suites()),
            "pytest -m gpu": _pytest("tests", "-m", "gpu"),
        }
    entries = [run(f"mambax: {name}", command, limit) for name, command in commands.items()]
    yield Case("tests", {"kind": "tests"}, entries)


def sanitizer(c: Context) -> Iterator[Case]:
    """compute-sanitizer over the kernels' tests at small sizes: accesses out of bounds, and races."""
    tool = shutil.which("compute-sanitizer")
    files = _kernel_tests()
    for file in files:
        entries = []
        for check in ("memcheck", "racecheck"):
            label = f"mambax: {check} of {Path(file).stem}"
            if tool is None or c.plan.device != "cuda":
                reason = "there is no compute-sanitizer here" if tool is None else "a dry run has no GPU"
                entries.append(Entry(label, "skipped", reason))
                continue
            watch = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
            command = [*watch, *_pytest("-x", "-k", SMALL, file)]
            limit = c.arena.pace.part_s / (2 * len(files))
            # torch's allocator would hide accesses beyond a tensor
            entries.append(run(label, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
        yield Case("sanitizer", {"kind": "tests"}, entries)


def peers(c: Context) -> Iterator[Case]:
    """Compile the peers, so that no other part waits for it."""
    entries = []
    for name in gpu_peers.EXTENSIONS:
        entry = Entry(name)
        start = time.perf_counter()
        try:
            if c.peers is None:
                gpu_peers.load(name, folder=None)
            else:
                gpu_peers.build(c.peers, name)
            entry.seconds = summary([time.perf_counter() - start])
        except Unavailable as reason:
            entry.status, entry.reason = "skipped", str(reason)
        entries.append(entry)
    yield Case("peers", {"kind": "build"}, entries)
