"""The fused CPU kernels in threads, after a fork, in any installation; and what they refuse.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from mambax_cpu import convolution, scan
from mambax_cpu.threads import default_threads
from mambax_cpu.tiles import SCAN_GROUP as GROUP
from mambax_cpu.tiles import SCAN_TILE as TILE
from mambax_cpu.tiles import WIDTH
from test_cpu_kernels import conv_values, scan_values


def everything(threads: int) -> list[np.ndarray]:
    """Outputs and gradients of both ops, large enough to be cut into ranges."""
    values = scan_values(3, 2 * TILE + 1, 3 * GROUP * WIDTH + 5, 16)
    given = scan.arguments(**values, delta_softplus=True)
    y, final, saved = scan.forward(given, save=True, threads=threads)
    gradients = scan.backward(given, saved, y, final, threads=threads)
    convolved = convolution.arguments(**conv_values(3, 300, 203, 4))
    out = convolution.forward(convolved, threads=threads)
    return [y, final, *gradients, out, *convolution.backward(convolved, out, threads=threads)]


def test_results_do_not_depend_on_the_number_of_threads():
    want = everything(1)
    for threads in (2, 3, 8):
        for got, expected in zip(everything(threads), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_several_python_threads_at_once():
    want, wrong = everything(1), []

    def work() -> None:
        for _ in range(3):
            for got, expected in zip(everything(3), want, strict=True):
                if not np.array_equal(got, expected):
                    wrong.append(got)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


COMPUTE = """
import numpy as np
from mambax_cpu import scan
def compute():
    x = np.linspace(-1, 1, 2 * 300 * 64, dtype=np.float32).reshape(2, 300, 64)
    B = np.ascontiguousarray(x[..., :16])
    given = scan.arguments(x, x, -np.ones((64, 16), np.float32), B, B, delta_softplus=True)
    return scan.forward(given, threads=4)[0].sum().item()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_after_a_fork():
    code = f"""
import os, warnings
warnings.simplefilter("ignore")  # forking where threads live: what is tested
{COMPUTE}
want = compute()
child = os.fork()
if child == 0:
    os._exit(0 if compute() == want else 1)
status = os.waitpid(child, 0)[1]
assert status == 0 and compute() == want
print("same")
"""
    assert python(code) == "same"


def test_importing_the_package_loads_no_compiler():
    code = "import sys, mambax_cpu, mambax_numpy; print('llvmlite' in sys.modules, repr(mambax_cpu.missing()))"
    assert python(code) == "False ''"


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads() >= 1


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "mask"])
def test_a_shape_that_does_not_fit_is_refused(name):
    values = scan_values(2, 5, 4, 3) | {"mask": np.ones((2, 5), bool)}
    values[name] = values[name][..., :-1]
    with pytest.raises(ValueError, match=r"must be of shape|must be \(B, L, D\)"):
        scan.arguments(**values)


@pytest.mark.parametrize("name", ["weight", "bias", "initial_state"])
def test_a_shape_that_does_not_fit_the_convolution_is_refused(name):
    values = conv_values(2, 5, 4, 3)
    values[name] = np.concatenate([values[name], values[name]])
    with pytest.raises(ValueError, match="must be of shape"):
        convolution.arguments(**values)


def test_float64_and_missing_states_are_refused():
    values = scan_values(1, 3, 4, 3)
    with pytest.raises(ValueError, match="float64"):
        scan.arguments(**values | {"u": np.float64(values["u"])})
    given = scan.arguments(**values)
    with pytest.raises(ValueError, match="save=True"):
        scan.backward(given, scan.forward(given)[2], values["u"])
    with pytest.raises(ValueError, match="gradient of y"):
        scan.backward(given, scan.forward(given, save=True)[2], values["u"][:, :2])
    with pytest.raises(ValueError, match="'relu'"):
        convolution.arguments(**conv_values(1, 3, 4, 3), activation="relu")


def test_naming_the_kernels_for_float64_is_refused():
    import mambax_numpy

    values = {name: np.float64(value) for name, value in scan_values(1, 3, 4, 3).items()}
    with pytest.raises(ValueError, match=r"'cpu' cannot run here.*float64"):
        mambax_numpy.selective_scan(**values, impl="cpu")
    assert mambax_numpy.selective_scan(**values)[0].dtype == np.float64
