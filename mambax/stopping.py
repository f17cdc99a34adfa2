"""Stop strings in a stream of text."""

from __future__ import annotations


class StopText:
    """Passes text on up to the first stop string, holding back what may be the start of one.

    Args:
        stops: the strings; none of them empty.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is certain to come before any stop string, and whether one was reached."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            before, self._held = self._held[: min(found)], ""
            return before, True
        keep = max(self._overlap(stop) for stop in self._stops)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain, False

    def finish(self) -> str:
        """The text held back, now that no more will come."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest proper beginning of ``stop`` that the held text ends with."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
