"""The scan in torch ops with bounded memory, which devices without kernels use; here on the CPU.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_scan import arguments, mask_of
from tolerances import assert_close

from mambax import scan

torch = pytest.importorskip("torch")
chunked = pytest.importorskip("mambax_torch.chunked")
ops = pytest.importorskip("mambax_torch.ops")

LENGTH = 2 * scan.CHUNK + 37
ALGORITHMS = pytest.mark.parametrize("algorithm", ["sequential", "pscan", "logcumsumexp"])


def leaves(length: int = LENGTH, **flags: Any) -> dict[str, Any]:
    given: dict[str, Any] = {name: torch.tensor(x, requires_grad=True) for name, x in arguments(length).items()}
    return given | {name: torch.tensor(value) for name, value in flags.items()}


def gradients(function: Any, given: dict[str, Any], **options: Any) -> dict[str, Any]:
    y, final = function(**given, delta_softplus=True, **options)
    mask = given.get("mask")
    y = y if mask is None else y * mask[..., None]
    (y.square().sum() + final.square().sum()).backward()
    return {"y": y, "final": final, **{k: x.grad for k, x in given.items() if x is not None and x.requires_grad}}


def plain(algorithm: str) -> Any:
    return lambda **given: scan.selective_scan(ops, algorithm=algorithm, **given)


@ALGORITHMS
@pytest.mark.parametrize("flags", ["none", "mask", "boundaries"])
def test_the_same_numbers_as_in_one_piece(algorithm, flags):
    few = algorithm == "logcumsumexp" and flags == "boundaries"  # a sum over all steps for each step
    length = 70 if few else LENGTH
    marked = {} if flags == "none" else {flags: mask_of(3, length)[:2]}
    want = gradients(plain(algorithm), leaves(length, **marked))
    got = gradients(chunked.selective_scan, leaves(length, **marked), algorithm=algorithm)
    for name, x in want.items():
        assert_close(got[name].detach(), x.detach(), what=name, tolerance=1e-5)


def kept(function: Any, length: int, **options: Any) -> int:
    """Bytes that autograd keeps for the gradient, each piece of memory once."""
    storages: dict[int, int] = {}

    def pack(x: Any) -> Any:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    given = leaves(length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function(**given, delta_softplus=True, **options)
    assert outputs[0].requires_grad
    return sum(storages.values())


def test_memory_for_the_gradient_is_that_of_one_chunk(monkeypatch):
    chunk = 64
    monkeypatch.setitem(scan.ALGORITHMS, "pscan", (scan.ALGORITHMS["pscan"][0], chunk))
    of_states = 2 * 5 * 3 * 4  # bytes of (B, D, N)
    short, long = (kept(chunked.selective_scan, n * chunk, algorithm="pscan") for n in (8, 32))
    inputs = sum(x.nbytes for name, x in arguments(chunk).items() if name in ("u", "delta", "B", "C", "z"))
    assert (long - short) / 24 <= 1.5 * (inputs + of_states)  # for each chunk: its inputs, and a state
    assert kept(plain("pscan"), 32 * chunk) > 5 * long


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode in torch uses it
def test_where_nothing_can_be_run_again_it_runs_as_it_is():
    given = {name: x.detach() for name, x in leaves(300).items()}
    u = given.pop("u")

    def loss(u: Any) -> Any:
        return chunked.selective_scan(u, **given, delta_softplus=True, algorithm="pscan")[0].square().sum()

    leaf = u.clone().requires_grad_()
    loss(leaf).backward()
    assert_close(torch.func.grad(loss)(u), leaf.grad)
    assert_close(torch.func.jvp(loss, (u,), (u,))[1], (leaf.grad * u).sum())
    with torch.no_grad():
        assert not loss(leaf).requires_grad


def test_bad_arguments_are_refused_before_anything_runs():
    given = leaves() | {"B": torch.zeros(2, LENGTH, 7)}
    with pytest.raises(ValueError, match=r"B is \(2, 549, 7\); expected \(2, 549, 3\)"):
        chunked.selective_scan(**given, algorithm="pscan")
    flags = mask_of(3, LENGTH)[:2]
    with pytest.raises(ValueError, match="a mask and boundaries"):
        chunked.selective_scan(**leaves(mask=flags, boundaries=flags), algorithm="pscan")


def test_a_planted_error_is_caught(monkeypatch):
    """A state that is not handed to the next chunk."""
    want = gradients(plain("pscan"), leaves())
    run = scan.selective_scan
    monkeypatch.setattr(scan, "selective_scan", lambda *a, **o: run(*a, **o | {"initial_state": None}))
    got = gradients(chunked.selective_scan, leaves() | {"initial_state": None}, algorithm="pscan")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got["y"].detach(), want["y"].detach())
