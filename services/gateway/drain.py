"""End the answers that still run when the time to drain is over."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from chiasm.common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from .chat_events import ChatDelta


class Drain:
    """The bound on how long answers may go on once the gateway is stopped.

    Attributes:
        max_s: Most seconds from the stop to the end of the last answer.
    """

    def __init__(self, max_s: float) -> None:
        self.max_s = max_s
        self._is_over = False
        self._waits: set[asyncio.Timeout] = set()

    def expire(self) -> None:
        """End every answer that still runs, and those to come, with an error."""
        self._is_over = True
        waits, self._waits = self._waits, set()
        now_s = asyncio.get_running_loop().time()
        for wait in waits:
            wait.reschedule(now_s)

    async def end_on_expiry(
        self, deltas: AsyncGenerator[ChatDelta, None]
    ) -> AsyncGenerator[ChatDelta, None]:
        """Yield ``deltas`` and close them at the end.

        Raises:
            UnavailableError: The time to drain is over.
        """
        async with aclosing(deltas):
            while True:
                try:
                    async with asyncio.timeout(0 if self._is_over else None) as wait:
                        with self._watched(wait):
                            delta = await anext(deltas)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not wait.expired():
                        raise
                    raise UnavailableError(
                        "The server is shutting down; please try again.",
                        reason="DRAINING",
                        retry_after_s=1.0,
                    ) from None
                yield delta

    @contextmanager
    def _watched(self, wait: asyncio.Timeout) -> Iterator[None]:
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)
