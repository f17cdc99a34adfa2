"""Stop strings in a stream of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambax.stopping import StopText


def run(stops: tuple[str, ...], parts: list[str]) -> tuple[str, bool, list[str]]:
    """The text that came through, whether a stop string was reached, and the pieces."""
    stop = StopText(stops)
    pieces = []
    for part in parts:
        text, stopped = stop.add(part)
        pieces.append(text)
        if stopped:
            return "".join(pieces), True, pieces
    pieces.append(stop.finish())
    return "".join(pieces), False, pieces


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_first_stop_string_ends_the_text_however_it_is_cut(parts: list[str], stops: tuple[str, ...]) -> None:
    text, stopped, _ = run(stops, parts)
    taken = ""
    for part in parts:  # the earliest part after which a stop string is there
        taken += part
        found = [at for at in (taken.find(stop) for stop in stops) if at >= 0]
        if found:
            assert (text, stopped) == (taken[: min(found)], True)
            return
    assert (text, stopped) == (taken, False)


def test_what_may_be_the_start_of_a_stop_string_is_held_back() -> None:
    _, _, pieces = run(("\nUser:",), ["Hello", "\n", "Us", "eful", "\nUse"])
    assert pieces == ["Hello", "", "", "\nUseful", "", "\nUse"]


def test_the_text_of_a_stop_string_does_not_come_through() -> None:
    assert run(("STOP",), ["one S", "TO", "P two"])[:2] == ("one ", True)


def test_a_stop_string_may_begin_inside_another_one_s_start() -> None:
    assert run(("aab",), ["aa", "ab"])[:2] == ("a", True)


@pytest.mark.parametrize("parts", [[], [""], ["a", "", "b"]])
def test_without_stop_strings_everything_passes_at_once(parts: list[str]) -> None:
    stop = StopText(())
    assert [stop.add(part) for part in parts] == [(part, False) for part in parts]
    assert stop.finish() == ""


def test_only_what_may_still_become_a_stop_string_is_kept() -> None:
    stop = StopText(("x" * 10,))
    assert sum(len(stop.add("xxxxxxxxx" + "a")[0]) for _ in range(1000)) == 10000
    assert stop.finish() == ""
