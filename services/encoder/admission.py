"""Refuse work at once when the encoder already has as much as it can answer in time."""

from __future__ import annotations

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
    """Most items, source bytes and pixels that may be in the encoder at one time."""

    max_items: int
    max_source_bytes: int
    max_pixels: int


class Admission:
    """Counts what is in the encoder; the three budgets are never exceeded."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._num_items = 0
        self._num_source_bytes = 0
        self._num_pixels = 0
        self._seconds_per_pixel = 0.0

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
        """Learn from an encoded item how long pixels take, for the advice to retry."""
        sample = seconds / max(1, num_pixels)
        known = self._seconds_per_pixel or sample
        self._seconds_per_pixel = known + _SMOOTHING * (sample - known)

    def _charge(self, source_bytes: int, pixels: int) -> None:
        if (
            self._num_source_bytes + source_bytes > self._limits.max_source_bytes
            or self._num_pixels + pixels > self._limits.max_pixels
        ):
            raise self._overloaded()
        self._num_source_bytes += source_bytes
        self._num_pixels += pixels
        ENCODER_QUEUE_PIXELS.set(self._num_pixels)

    def _release(self, source_bytes: int, pixels: int) -> None:
        self._num_items -= 1
        self._num_source_bytes -= source_bytes
        self._num_pixels -= pixels
        ENCODER_QUEUE_PIXELS.set(self._num_pixels)

    def _overloaded(self) -> OverloadedError:
        wait_s = self._seconds_per_pixel * self._num_pixels
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

    def charge_source(self, num_bytes: int) -> None:
        """Add the bytes of the item's source; raise ``OverloadedError`` over the budget."""
        self._admission._charge(num_bytes, 0)
        self._source_bytes += num_bytes

    def charge_pixels(self, num_pixels: int) -> None:
        """Add the item's pixels; raise ``OverloadedError`` over the budget."""
        self._admission._charge(0, num_pixels)
        self._pixels += num_pixels

    def __enter__(self) -> AdmissionTicket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission._release(self._source_bytes, self._pixels)
