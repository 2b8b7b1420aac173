"""Take fewer threads while something that is not ours keeps some of them from running.

All threads of a product wait for the last of them. Where another process takes one of two cores,
two threads take three times as long as one, because the system puts both on the other core or lets
one of them wait for its turn again and again.

A thread that computes never sleeps as long as the others run: it spins until they are done. So the
share of the time that it spent on a core tells whether they ran, whoever takes the cores and
however many there are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

# Time of computing by which it is decided: some steps of the system's scheduler.
_WINDOW_S = 0.1
# About where a thread less takes as long.
_LEAST_SHARE = 0.7
# Low shares one after the other by which a thread is given up: a service of ours that begins to
# compute, or a busy moment of another thread of this process, makes one or two.
_NUM_LOW_SHARES = 3
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 8.0

log = structlog.get_logger(__name__)


class ThreadBound:
    """Bounds the threads of the thread that computes, which alone calls this."""

    def __init__(
        self,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        """Build without a bound.

        Args:
            wall: Source of seconds; injected by tests.
            cpu: Source of seconds that the calling thread spent on a core; as above.
        """
        self._wall = wall
        self._cpu = cpu
        self._num_threads = 1
        self._last: tuple[float, float] | None = None
        self._wall_s = self._cpu_s = 0.0
        self._num_low_shares = 0
        self._bound: int | None = None
        self._is_trial = False
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S

    def apply(self, wanted: int) -> int:
        """Return how many of the ``wanted`` threads to use from now on; call it between layers."""
        now, cpu = self._wall(), self._cpu()
        if self._last is not None and self._num_threads > 1:
            self._wall_s += now - self._last[0]
            self._cpu_s += cpu - self._last[1]
            if self._wall_s >= _WINDOW_S:
                self._decide(now)
        self._last = now, cpu
        if self._bound is not None and now >= self._retry_at and wanted >= max(2, self._bound):
            self._raise(now, wanted)
        self._num_threads = wanted if self._bound is None else min(wanted, self._bound)
        return self._num_threads

    def pause(self) -> None:
        """Tell that until the next ``apply`` nothing is computed, or not in layers."""
        self._last = None

    def _decide(self, now: float) -> None:
        share = self._cpu_s / self._wall_s
        is_trial, self._is_trial = self._is_trial, False
        self._wall_s = self._cpu_s = 0.0
        if share >= _LEAST_SHARE:
            self._num_low_shares = 0
            if is_trial or self._bound is None:
                self._retry_s = _FIRST_RETRY_S
            return
        self._num_low_shares += 1
        if self._num_low_shares < _NUM_LOW_SHARES and not is_trial:
            return
        self._num_low_shares = 0
        if self._bound is None:
            log.info("cores_are_crowded", threads=self._num_threads - 1, share=round(share, 2))
        self._bound = self._num_threads - 1
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def _raise(self, now: float, wanted: int) -> None:
        """Try one thread more; what comes of it, the next decision tells."""
        assert self._bound is not None, "there is a bound to raise"
        self._wall_s = self._cpu_s = 0.0
        self._is_trial = True
        self._bound += 1
        self._retry_at = now + _FIRST_RETRY_S
        if self._bound > wanted:
            self._bound = None
            log.info("cores_are_free", threads=wanted)
