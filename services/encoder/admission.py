"""Refuse work at once when the encoder already has as much as it can answer in time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import OverloadedError
from chiasm.common.metrics import ENCODER_QUEUE_PIXELS

if TYPE_CHECKING:
    from types import TracebackType

_SMOOTHING = 0.2
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Most items, source bytes and pixels at one time, and seconds that queued encodes may take."""

    max_items: int
    max_source_bytes: int
    max_pixels: int
    max_wait_s: float = math.inf


class Admission:
    """Counts what is in the encoder; the budgets are never exceeded.

    Work is counted by embedding id: calls for one embedding share one encode.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._num_items = 0
        self._num_source_bytes = 0
        self._num_pixels = 0
        self._num_tickets: dict[bytes, int] = {}
        self._num_work_pixels = 0
        # Their ratio is the speed; smoothed apart, so that tiny items weigh little.
        self._item_seconds = 0.0
        self._item_pixels = 0.0

    def admit(self) -> AdmissionTicket:
        """Take one item in; leave the ``with`` block of the ticket to release it.

        Raises:
            OverloadedError: There are too many items; says when to try again.
        """
        if self._num_items >= self._limits.max_items:
            raise self._overloaded()
        self._num_items += 1
        return AdmissionTicket(self)

    def observe(self, num_pixels: int, seconds: float) -> None:
        """Learn from an encoded item how long pixels take.

        Args:
            num_pixels: Pixels that it was charged.
            seconds: Seconds of the tower's work on it, without any wait.
        """
        weight = _SMOOTHING if self._item_pixels else 1.0
        self._item_seconds += weight * (seconds - self._item_seconds)
        self._item_pixels += weight * (num_pixels - self._item_pixels)

    def _charge(self, source_bytes: int, pixels: int) -> None:
        if (
            self._num_source_bytes + source_bytes > self._limits.max_source_bytes
            or self._num_pixels + pixels > self._limits.max_pixels
        ):
            raise self._overloaded()
        self._num_source_bytes += source_bytes
        self._num_pixels += pixels
        ENCODER_QUEUE_PIXELS.set(self._num_pixels)

    def _queue(self, embedding_id: bytes, num_pixels: int) -> None:
        num_tickets = self._num_tickets.get(embedding_id, 0)
        if not num_tickets:
            if self._wait_s(self._num_work_pixels) > self._limits.max_wait_s:
                raise self._overloaded()
            self._num_work_pixels += num_pixels
        self._num_tickets[embedding_id] = num_tickets + 1

    def _leave_queue(self, embedding_id: bytes, num_pixels: int) -> None:
        self._num_tickets[embedding_id] -= 1
        if not self._num_tickets[embedding_id]:
            del self._num_tickets[embedding_id]
            self._num_work_pixels -= num_pixels

    def _wait_s(self, num_pixels: int) -> float:
        """Return the seconds that encoding takes; 0 while nothing was encoded yet."""
        return num_pixels * self._item_seconds / self._item_pixels if self._item_pixels else 0.0

    def _release(self, source_bytes: int, pixels: int) -> None:
        self._num_items -= 1
        self._num_source_bytes -= source_bytes
        self._num_pixels -= pixels
        ENCODER_QUEUE_PIXELS.set(self._num_pixels)

    def _overloaded(self) -> OverloadedError:
        wait_s = self._wait_s(self._num_pixels)
        return OverloadedError(
            "The encoder is busy and cannot accept new media items; please try again later.",
            retry_after_s=min(_MAX_RETRY_AFTER_S, max(1.0, wait_s)),
        )


class AdmissionTicket:
    """One admitted item and what it was charged; a context manager that gives all of it back."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._source_bytes = 0
        self._pixels = 0
        self._work: tuple[bytes, int] | None = None

    def charge_source(self, num_bytes: int) -> None:
        """Add the bytes of the item's source; raise ``OverloadedError`` over the budget."""
        self._admission._charge(num_bytes, 0)
        self._source_bytes += num_bytes

    def charge_pixels(self, num_pixels: int) -> None:
        """Add the item's pixels; raise ``OverloadedError`` over the budget."""
        self._admission._charge(0, num_pixels)
        self._pixels += num_pixels

    def queue_work(self, embedding_id: bytes, num_pixels: int) -> None:
        """Count the item's encode, once per ticket.

        An item before which nothing is queued is always taken, however large it is.

        Raises:
            OverloadedError: Other encodes are queued that take too long; says when to try again.
        """
        self._admission._queue(embedding_id, num_pixels)
        self._work = (embedding_id, num_pixels)

    def __enter__(self) -> AdmissionTicket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission._release(self._source_bytes, self._pixels)
        if self._work is not None:
            self._admission._leave_queue(*self._work)
