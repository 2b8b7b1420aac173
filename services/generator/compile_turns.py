"""Let tenants take turns at what is done one at a time, by what they have taken already."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from chiasm.common.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_WAITING = 32
MAX_WAIT_S = 10.0


class CompileTurns:
    """Turns of one thread, which is the bottleneck of all that wait for it.

    The next turn is that of the tenant that has taken least time, of those who wait, and there the
    oldest. A tenant that comes back after a pause begins where the least of the others is, so that
    nobody saves up for a burst. Where all places are taken, the tenant that waits with most gives
    up its newest one to a tenant with fewer.

    Invariants:
        1. Nobody waits unless somebody has the turn.
        2. A tenant is known while it waits or has the turn, and no longer.
        3. No more than ``MAX_WAITING`` wait.

    Source: virtual token counters, as ``WaitingQueue``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nobody; ``clock`` tells seconds and never goes back."""
        self._clock = clock
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._taken_s: dict[str, float] = {}
        self._holder: str | None = None
        self._began_at = 0.0

    async def take(self, tenant: str) -> None:
        """Return when it is the turn of ``tenant``, which must ``end`` it.

        Raises:
            OverloadedError: Too many wait, or this one has waited too long. It has no turn, nor if
                it is cancelled.
        """
        self._taken_s.setdefault(tenant, min(self._taken_s.values(), default=0.0))
        if self._holder is None:
            self._begin(tenant)
            return
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            self._make_room(tenant)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        has_turn = False
        try:
            await asyncio.wait([turn], timeout=MAX_WAIT_S)
            has_turn = turn.done() and not turn.cancelled()
        finally:
            if not has_turn:
                self._give_up(tenant, turn)
        if not has_turn:
            raise _overloaded()

    def end(self) -> None:
        """End the turn that was taken last, and give the next one."""
        assert self._holder is not None, "somebody has the turn"
        tenant, self._holder = self._holder, None
        self._taken_s[tenant] += self._clock() - self._began_at
        if self._waiting:
            following = min(self._waiting, key=lambda name: self._taken_s[name])
            self._begin(following)
            self._waiting[following].popleft().set_result(None)
            self._settle(following)
        self._settle(tenant)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if an invariant does not hold."""
        assert self._holder is not None or not self._waiting
        assert all(self._waiting.values())
        assert set(self._taken_s) == {*self._waiting, self._holder} - {None}
        assert sum(map(len, self._waiting.values())) <= MAX_WAITING

    def _begin(self, tenant: str) -> None:
        self._holder = tenant
        self._began_at = self._clock()

    def _make_room(self, tenant: str) -> None:
        largest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        if len(self._waiting[largest]) <= len(self._waiting.get(tenant, ())) + 1:
            self._settle(tenant)
            raise _overloaded()
        self._waiting[largest].pop().cancel()

    def _give_up(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Forget a turn that nobody waits for, wherever it has got to."""
        if turn.cancelled():
            return
        if turn.done():
            self.end()
        else:
            self._waiting[tenant].remove(turn)
            self._settle(tenant)

    def _settle(self, tenant: str) -> None:
        """Forget a tenant that does not wait, and what it took unless it has the turn."""
        if tenant in self._waiting and not self._waiting[tenant]:
            del self._waiting[tenant]
        if tenant not in self._waiting and tenant != self._holder:
            self._taken_s.pop(tenant, None)


def _overloaded() -> OverloadedError:
    return OverloadedError("Too many guides wait to be compiled.", retry_after_s=1.0)
