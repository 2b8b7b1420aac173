"""Stop calling something that keeps failing, and find out cheaply when it is back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a breaker opens and how long it stays open.

    Attributes:
        num_failures: Failures in a row that open it.
        first_open_s: Seconds until the first probe; doubles with every probe that fails.
        longest_open_s: Bound of that doubling.
    """

    num_failures: int = 3
    first_open_s: float = 0.5
    longest_open_s: float = 4.0


class CircuitBreaker:
    """A breaker: closed, open, or half open with one probe on its way.

    ::

        closed --k failures in a row--> open --time passes--> half open --probe succeeds--> closed
                                         ^------------------------'  probe fails

    Every ``admit`` that returned ``True`` is followed by exactly one of ``record_success``,
    ``recover``, ``record_failure`` and ``release``. ``trip`` leads to half open as well. Failures
    of calls admitted before the breaker opened change nothing more.
    """

    def __init__(
        self, settings: BreakerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._num_failures = 0
        self._open_s = settings.first_open_s
        self._probe_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether calls are refused or reduced to one probe."""
        return self._probe_at is not None

    @property
    def probe_in_s(self) -> float:
        """Seconds until a probe may be made; 0 if one may be, or if it is closed."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    def admit(self) -> bool:
        """Tell whether a call may be made now; in the half-open state only one may."""
        if self._probe_at is None:
            return True
        if self._is_probing or self._clock() < self._probe_at:
            return False
        self._is_probing = True
        return True

    def record_success(self) -> None:
        """Note that an admitted call was answered; closes the breaker."""
        self._num_failures = 0
        self._open_s = self._settings.first_open_s
        self._probe_at = None
        self._is_probing = False

    def recover(self) -> None:
        """Note that a probe was answered; closes the breaker, which opens at the next failure.

        For probes that are slighter than the calls they stand for.
        """
        self._probe_at = None
        self._is_probing = False

    def record_failure(self) -> None:
        """Note that an admitted call failed; opens the breaker if it was one too many."""
        if self._is_probing:
            self._open_s = min(2 * self._open_s, self._settings.longest_open_s)
            self._open()
        elif self._probe_at is None:
            self._num_failures += 1
            if self._num_failures >= self._settings.num_failures:
                self._open()

    def trip(self) -> None:
        """Open at once on a mere suspicion; a probe may be made right away."""
        if self._probe_at is None:
            self._probe_at = self._clock()

    def release(self) -> None:
        """Note that an admitted call ended without a verdict, as a cancelled one does."""
        self._is_probing = False

    def _open(self) -> None:
        self._probe_at = self._clock() + self._open_s
        self._is_probing = False
