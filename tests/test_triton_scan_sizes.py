"""How the Triton scan is laid out over a GPU, its machine code, and sizes that only a GPU can hold.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import GRADIENT, assert_close

from mambax import scan as algorithms

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import torch
from mambax_torch import ops
from mambax_torch.kernels import scan, tuning
from triton_scan_cases import DEVICE, leaves, probes, results, triton_scan, values_of

# --- how it is laid out -------------------------------------------------------------------------------------------


def test_segments_cover_every_step():
    for batch, length, channels, n in np.random.default_rng(0).integers(1, (9, 9000, 3000, 200), (500, 4)).tolist():
        block, number, steps = tuning.segments_of(tuning.Layout(), batch, length, channels, n, 132)
        assert block & (block - 1) == 0
        assert (number - 1) * steps < length <= number * steps
        if number == 1:
            assert steps == length
        else:
            assert batch * -(-channels // block) * number <= tuning.Layout().fill * 132  # all at the same time
    assert tuning.segments_of(tuning.Layout(), 8, 2048, 5120, 16, 132).number == 1
    assert tuning.segments_of(tuning.Layout(), 1, 8192, 1536, 16, 132).number == 66


def test_what_is_saved_for_the_gradient_is_a_fraction_of_all_states():
    """Less of it where there is much."""
    for length, n, interval in ((512, 1, 64), (512, 16, 64), (2048, 16, 128), (512, 64, 128), (16384, 256, 256)):
        assert np.prod(scan.saved_shape(8, length, 768, n)) * interval == 8 * length * 768 * n
    assert scan.saved_shape(8, 65536, 5120, 64) == (8, 128, 64, 5120)


def test_groups_are_few_where_that_costs_little():
    assert tuning.groups_of(8192, 48, 1056) == 1  # intervals alone are enough for all programs
    assert tuning.groups_of(8, 48, 1056) == 48
    for intervals, blocks, programs in np.random.default_rng(0).integers(1, (5000, 200, 2000), (200, 3)).tolist():
        groups = tuning.groups_of(intervals, blocks, programs)
        assert 1 <= groups <= blocks
        rounds, least = (-(-intervals * n // programs) * -(-blocks // n) for n in (groups, blocks))
        assert rounds <= 1.2 * least


def test_a_measurement_is_kept_and_a_broken_file_is_as_good_as_none(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "cache" / "scan.json")
    monkeypatch.setattr(tuning, "_name", lambda device: "a GPU")
    device, sizes = torch.device("cuda", 0), (1, 8000, 1500, 16)
    tuning._measured.cache_clear()
    assert tuning.layout_of(device, *sizes) == tuning.Layout()
    best = tuning.CANDIDATES[2]
    times = tuning.tune(device, *sizes, lambda layout: 0.5 if layout == best else 1.0)
    assert times.keys() == set(tuning.CANDIDATES)
    assert tuning.layout_of(device, *sizes) == best
    assert tuning.layout_of(device, 1, 8100, 1501, 16) == best  # of the same class
    assert tuning.layout_of(device, 2, 8000, 1500, 16) == tuning.Layout()
    for broken in ("", "[]", "{}", '{"a": 1}', json.dumps({"a GPU": {"speed": 1}})):
        tuning.path().write_text(broken, encoding="utf-8")
        tuning._measured.cache_clear()
        assert tuning.layout_of(device, *sizes) == tuning.Layout()
    tuning._measured.cache_clear()


# --- machine code and large sizes ---------------------------------------------------------------------------------


def test_compiled_for_an_h100(tmp_path):
    """Every state of a channel in one thread, forwards, and everything in registers; a little is not, backwards."""
    program = Path(__file__).with_name("triton_machine_code.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, timeout=250, check=False
    )
    if run.returncode == 3:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found.keys() == {"output", "output saving states", "advance", "carry", "adjoint", "gradient"}
    for name, code in found.items():
        assert code["local"] <= (400 if name == "gradient" else 0), (name, code)
        assert code["shuffles"] <= (120 if name == "gradient" else 0), (name, code)
        assert code["registers"] <= 255, (name, code)
        assert 0 < code["special"] < code["loop"], (name, code)


def part_of(values: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments from one step to another."""
    return {name: x[:, start:stop] if x.ndim == 3 and name != "initial_state" else x for name, x in values.items()}


def compare_pieces(values: dict[str, Any], starts: list[int], steps: int) -> None:
    """A long scan against the array algorithm, in pieces that start from states that the scan itself gave."""
    whole, _ = triton_scan(**values, delta_softplus=True)
    for start in starts:
        before = {
            name: x[:, :start] if x.ndim == 3 and name != "initial_state" else x for name, x in values.items()
        }
        part = slice(start, start + steps)
        piece = {name: x[:, part] if x.ndim == 3 and name != "initial_state" else x for name, x in values.items()}
        state = triton_scan(**before, delta_softplus=True)[1] if start else values.get("initial_state")
        y, _ = algorithms.selective_scan(ops, **piece | {"initial_state": state}, delta_softplus=True)
        assert torch.isfinite(whole[:, part]).all()
        assert_close(whole[:, part].cpu(), y.cpu(), what=f"from step {start}")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_a_million_steps_forwards_and_backwards():
    values = values_of(1, 1_000_000, 64, 16)
    compare_pieces(values, [0, 499_900, 999_700], 300)
    given = leaves(values)
    outputs, gradients = results(triton_scan, given, delta_softplus=True)
    for name, x in {**outputs, **gradients}.items():
        assert torch.isfinite(x).all(), name
    # the last steps: a loss of them alone is that of a short scan from the state before them
    start = 999_744
    tail, head = part_of(values, start, 1_000_000), part_of(values, 0, start)
    tail["initial_state"] = triton_scan(**head, delta_softplus=True)[1]
    of_y, of_final = probes(values)
    short = leaves(tail, torch.float64)
    y, final = algorithms.selective_scan(ops, **short, delta_softplus=True)
    ((y * of_y[:, start:]).sum() + (final * of_final).sum()).backward()
    for name in ("u", "delta", "B", "C", "z"):
        assert_close(
            gradients[name][:, start:].cpu(), short[name].grad.cpu(), what=name, tolerance=GRADIENT["float32"]
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_tensors_of_more_than_2_to_the_31_elements():
    batch, length, channels, n = 3, 180_000, 4096, 4  # 2.2e9 elements in u
    free, _ = torch.cuda.mem_get_info()
    if free < 60e9:
        pytest.skip(f"needs 60 GB of free GPU memory, found {free / 1e9:.0f}")
    small = values_of(batch, length, 8, n)
    wide = {
        name: small[name].to(torch.bfloat16).repeat(1, 1, channels // 8) for name in ("u", "delta", "z")
    }  # the same eight channels again and again, so that a wrong offset would show
    rest = {
        name: small[name].repeat(channels // 8, *[1] * (small[name].ndim - 1)) for name in ("A", "D", "delta_bias")
    }
    given = {**wide, **rest, "B": small["B"], "C": small["C"]}
    y, final = triton_scan(**given, delta_softplus=True)
    few = {name: small[name].to(torch.bfloat16) if name in wide else small[name] for name in given}
    want, end = triton_scan(**few, delta_softplus=True)
    for row in range(batch):
        for first in (0, 2048, channels - 8):
            assert_close(y[row, :, first : first + 8].float().cpu(), want[row].float().cpu(), "bfloat16")
            assert_close(final[row, first : first + 8].cpu(), end[row].cpu())
    del y
    for x in given.values():
        x.requires_grad_()
    y, _ = triton_scan(**given, delta_softplus=True)
    y.backward(torch.ones_like(y))
    gradient = wide["u"].grad
    assert torch.isfinite(gradient).all()
    assert_close(gradient[-1, :, -8:].float().cpu(), gradient[-1, :, :8].float().cpu())
