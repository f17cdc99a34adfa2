"""Kernels mean what they mean as Python: every construct compiled, beside the same function run by Python.

Dimensions: none.
"""

from __future__ import annotations

import math
from typing import Any

import kernel_cases
import numpy as np
import pytest
from kernel_cases import (
    bytes_and_words,
    calls,
    divided_by_zero,
    floats,
    logic,
    loops,
    of_both_types,
    selected,
    until,
    whole_numbers,
)
from mambax_cpu import code_generation
from mambax_cpu.kernel_types import KernelError

NUMBERS = [-7, -3, -1, 0, 1, 2, 3, 8, 13]


def in_python(compiled: Any, *args: int) -> Any:
    """What Python makes of the text of a kernel."""
    return compiled.function(*args)


@pytest.mark.parametrize("which", range(8))
def test_whole_numbers(which: int) -> None:
    for a in NUMBERS:
        for b in NUMBERS:
            assert whole_numbers(a, b, which) == in_python(whole_numbers, a, b, which), (a, b)


def test_a_division_by_zero_gives_zero() -> None:
    assert [divided_by_zero(a, 0) for a in NUMBERS] == [0] * len(NUMBERS)


@pytest.mark.parametrize("step", [-3, -1, 1, 2])
def test_loops(step: int) -> None:
    for start in NUMBERS:
        for stop in NUMBERS:
            assert loops(start, stop, step) == in_python(loops, start, stop, step)
    for stop in range(-1, 30):
        assert until(stop) == in_python(until, stop)


def test_a_range_without_a_step_has_no_numbers() -> None:
    assert loops(0, 5, 0) == loops(5, 5, 1) + sum(range(5, 0, -2)) * 1000


def test_logic_finds_no_more_than_it_needs() -> None:
    log = np.zeros(1, np.int64)
    place = log.__array_interface__["data"][0]
    for which in range(3):
        for bits in range(8):
            given = [(bits >> i & 1) for i in range(3)]
            log[0] = 0
            got = logic(*given, which, place)
            counts = {"log": 0}

            def checked(value: int, counts: dict[str, int] = counts) -> bool:
                counts["log"] = counts["log"] * 10 + 1
                return value > 0

            assert (got, log[0]) == (expected_logic(*given, which, checked), counts["log"]), (which, given)


def expected_logic(a: int, b: int, c: int, which: int, checked: Any) -> int:
    if which == 0:
        return 1 if checked(a) and checked(b) and not checked(c) else 2
    if which == 1:
        return 1 if checked(a) or (checked(b) and checked(c)) else 2
    over = checked(a) or b == c
    over = over and not (a == b or checked(c))
    if over:
        return 3
    return 4 if not over and (a or b) else 5


# --- parts ----------------------------------------------------------------------------------------------------


def test_parts_and_tuples() -> None:
    values = np.zeros(4, np.int64)
    for a in NUMBERS:
        for b in NUMBERS:
            more = 10 if a > b else 11
            low, high = sorted((a, b))
            got = calls(a, b, values.__array_interface__["data"][0])
            assert got == (high - low) * 100 + more + low * 10000
            assert values.tolist() == [0 + 4, 1 + 1 + 5 + 1, 2 + 2 + 6 + 2, 3 + 3 + 3]


def test_a_part_by_the_types_of_its_arguments() -> None:
    found = np.zeros(2, np.float32)
    selected(found.__array_interface__["data"][0])
    assert found.tolist() == [1, 2]


def test_a_part_called_with_other_types_is_another() -> None:
    memory = np.zeros(2, np.int64)
    of_both_types(memory, 3)
    assert memory[1] == 3
    assert memory.view(np.float32)[:2].tolist() == [1.5, 3.0]


# --- floats and memory ----------------------------------------------------------------------------------------


def test_floats_are_rounded_as_numpy_rounds_them() -> None:
    rng = np.random.default_rng(0)
    for number, count in ((0.1, 3), (1e-3, 5), (-2.5, 1)):
        start = rng.standard_normal(15).astype(np.float32) ** 2 + np.float32(0.01)
        got, f = start.copy(), np.float32
        floats(got, number, count)
        want = start.copy()
        x = want[0]
        want[1] = x * x + x / want[2]
        want[3], want[4] = f(count) / f(3), count / 3
        want[5] = float(x) + number
        want[6] = -x if x > number else 0.0
        want[7], want[8] = np.sqrt(want[2]), np.sqrt(f(1) / want[2] + f(number))
        want[9], want[10] = float(want[2]) * (count + 16777216), max(count, 1) / 7
        want[11] = float(want[11]) + 0.1
        want[12] = 2
        total = f(0)
        for i in range(count):
            total += want[i]
        want[13], want[14] = total, count * 0.1
        np.testing.assert_array_equal(got, want)
    start[0] = math.nan
    floats(start, 0.0, 1)
    assert start[12] == 1


def test_narrow_whole_numbers_in_memory() -> None:
    source, target = np.array([0, 200, 255, 3, 255, 255], np.uint8), np.zeros(5, np.int64)
    bytes_and_words(source, target)
    assert target.tolist() == [-1, 199, 254, 1, -1]
    assert source.tolist() == [0, 200, 255, 3, 5, 0]


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("refused_string", "expected a number, found 'text'"),
        ("refused_list", "List is not known in kernels"),
        ("refused_chain", "one comparison at a time"),
        ("refused_other_type", "b: expected int64 as before, found float64; use another variable"),
        ("refused_no_value", "b: has no value here"),
        ("refused_for_else", "a loop with else"),
        ("refused_not_a_range", "expected a loop over a range"),
        ("refused_named", "arguments are given one by one"),
        ("refused_foreign_function", "kernels may call parts and intrinsics alone, found math.floor"),
        ("refused_lanes_and_number", "expected two values of one type, found lanes and int64"),
        ("refused_numbers_joined", "`and` and `or` of numbers"),
        ("refused_sometimes", "gives something back, but not at its end"),
        ("refused_too_few", "expected 2 arguments, found 1"),
        ("refused_subscript_of_number", "expected an address before"),
        ("refused_with", "With is not known in kernels"),
        ("refused_float_in_integers", "expected int64, found float64"),
    ],
)
def test_what_kernels_cannot_do_is_refused_with_its_line(name: str, problem: str) -> None:
    function = getattr(kernel_cases, name)
    with pytest.raises(KernelError) as error:
        code_generation.object_code(function, "i", "mambax_test_refused")
    assert problem in str(error.value)
    if name != "refused_sometimes":
        first = function.__code__.co_firstlineno
        line = int(str(error.value).split("line ")[1].split(":")[0])
        assert first < line < first + 7


def test_parameters_with_defaults_are_refused() -> None:
    with pytest.raises(KernelError, match="expected plain parameters without defaults"):
        code_generation.object_code(kernel_cases.defaults, "ii", "mambax_test_defaults")
