"""Memory that the CPU kernels use again: never while anybody holds it."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import pytest
from mambax_cpu import buffers
from mambax_cpu.buffers import room

from mambax.registry import is_installed

SHAPE = (600, 1000)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    if not buffers._COUNTS:
        pytest.skip("this Python does not count references")
    monkeypatch.setattr(buffers, "_blocks", deque())


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_what_was_let_go_is_used_again():
    first = room(*SHAPE)
    place = address(first)
    del first
    again = room(500, 1000)
    assert address(again) == place
    assert again.shape == (500, 1000)
    assert again.dtype == np.float32
    assert again.flags.c_contiguous


@pytest.mark.parametrize("hold", [
    lambda array: array,
    lambda array: array[3:5, ::2].T,
    lambda array: array.reshape(-1).view(np.int32),
    memoryview,
    lambda array: np.asarray(memoryview(array))[1:2],
])  # fmt: skip
def test_what_is_held_is_not(hold):
    first = room(*SHAPE)
    first[:] = 1
    held = hold(first)
    del first
    second = room(*SHAPE)
    second[:] = 2
    np.testing.assert_array_equal(np.unique(np.ascontiguousarray(held).view(np.float32)), [1])


@pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
def test_tensors_hold_it():
    import torch

    tensor = torch.from_numpy(room(*SHAPE))[4:].detach()
    tensor[:] = 1
    room(*SHAPE)[:] = 2
    assert (tensor == 1).all()
    place = tensor.data_ptr() - 4 * tensor.stride(0) * 4
    del tensor
    assert address(room(*SHAPE)) == place


def test_no_more_is_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(buffers, "KEPT", 10 << 20)
    arrays = [room(1 << 20) for _ in range(5)]  # 4 MB each
    assert sum(block.nbytes for block in buffers._blocks) <= 10 << 20
    assert len({address(array) for array in arrays}) == 5
    assert room(4 << 20).nbytes == 16 << 20  # more than is kept
    assert sum(block.nbytes for block in buffers._blocks) <= 10 << 20


def test_small_and_far_smaller_arrays_have_their_own():
    large = room(4 << 20)
    place = address(large)
    del large
    assert address(room(1 << 20)) != place
    assert room(10).base is None


def test_threads_never_share():
    errors = []

    def work(number: int) -> None:
        for _ in range(200):
            array = room(1 << 18)
            array[:] = number
            if not (array == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
