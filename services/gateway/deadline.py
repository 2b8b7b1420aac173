"""The moment by which a request must be answered."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import DeadlineExceededError

if TYPE_CHECKING:
    from chiasm.common.grpc_client import EndpointPool

_MAX_PEER_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock, shared by all calls of one request."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Return the seconds left; raise ``DeadlineExceededError`` if there are none."""
        remaining = self.at_s - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceededError("The deadline passed before the work was done.")
        return remaining


async def wait_for_peer(pool: EndpointPool, deadline: Deadline) -> None:
    """Return when an endpoint serves, before a call is repeated.

    Raises:
        UnavailableError: None did within a second or the deadline.
    """
    await pool.wait_until_serving(min(_MAX_PEER_WAIT_S, deadline.remaining_s()))
