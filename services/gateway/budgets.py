"""Bound what the gateway holds and repeats: bytes in memory, retried calls."""

from __future__ import annotations


class ByteBudget:
    """A number of bytes that may be held at one time.

    Invariant: ``0 <= num_used <= max_bytes``.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_used = 0

    def reserve(self, num_bytes: int) -> bool:
        """Take ``num_bytes`` if they are free; tell whether they were."""
        if self.num_used + num_bytes > self._max_bytes:
            return False
        self.num_used += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        """Give back what ``reserve`` took."""
        self.num_used -= num_bytes
        assert self.num_used >= 0, "more bytes were released than reserved"


class RetryBudget:
    """Keeps retries a small part of all calls, so that they cannot multiply an outage.

    Each call adds a part of a retry, each retry takes a whole one; a few are there from the start.

    Source: retry throttling of gRPC, gRFC A6.
    """

    def __init__(self, max_retries: float = 10.0, retries_per_call: float = 0.2) -> None:
        self._max_retries = max_retries
        self._retries_per_call = retries_per_call
        self._num_left = max_retries

    def record_call(self) -> None:
        """Count a first attempt."""
        self._num_left = min(self._max_retries, self._num_left + self._retries_per_call)

    def take(self) -> bool:
        """Take one retry if there is one; tell whether there was."""
        if self._num_left < 1.0:
            return False
        self._num_left -= 1.0
        return True
