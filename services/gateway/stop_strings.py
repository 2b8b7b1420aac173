"""End an answer at a stop string, wherever token borders fall."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """Watches one answer for stop strings; holds back text that may be the start of one.

    The outcome does not depend on how the text was cut: the stop string that is complete first
    wins, the longer one if two are complete at the same character.

    ::

        ...returned│ skipped, returned │ not returned
                   └──────────── _held ──────────────┘
                   └── _num_shown ─────┘

    Invariant: no stop string ends in ``_held`` behind what was skipped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``; empty ones must have been refused before."""
        self._stops = tuple(stops)
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""
        self._num_shown = 0
        self.matched = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to watch for."""
        return not self._stops

    def skip(self, text: str) -> str:
        """Return ``text``: no stop string ends in it, but one may begin. Call before ``feed``."""
        text_so_far = self._held + text
        self._hold(text_so_far)
        self._num_shown = len(self._held)
        return text

    def feed(self, text: str) -> str:
        """Return the text that is safe to show after ``text`` was added.

        Once ``matched`` is set, the answer is over: the text before the stop string has been
        returned and later calls return nothing.
        """
        if not self._stops:
            return text
        if self.matched:
            return ""
        text, num_shown = self._held + text, self._num_shown
        found = [(index + len(stop), index, stop) for stop, index in self._find(text)]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[num_shown:start]
        self._hold(text)
        num_released = len(text) - len(self._held)
        self._num_shown = max(0, num_shown - num_released)
        return text[num_shown:num_released]

    def flush(self) -> str:
        """Return what is held back; the answer ended without a stop string."""
        text, self._held = self._held[self._num_shown :], ""
        return text

    def _find(self, text: str) -> list[tuple[str, int]]:
        first_end = self._num_shown + 1
        return [
            (stop, index)
            for stop in self._stops
            if (index := text.find(stop, max(0, first_end - len(stop)))) >= 0
        ]

    def _hold(self, text: str) -> None:
        self._held = text[len(text) - self._num_chars_held(text) :]

    def _num_chars_held(self, text: str) -> int:
        for length in range(min(len(text), self._max_held), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
