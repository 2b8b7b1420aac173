"""Choose what is let go of to make room, so that no tenant loses its share to another."""

from __future__ import annotations

import bisect
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Key = TypeVar("Key", bound="Hashable")

PROTECTED_S = 600.0
"""Seconds for which what was used is protected from other tenants."""


@dataclass(slots=True)
class _Holding(Generic[Key]):
    """What one tenant holds: how much, and what of it may go, least recently used first."""

    amount: int = 0
    queue: OrderedDict[Key, None] = field(default_factory=OrderedDict)


class FairQueue(Generic[Key]):
    """Cached things that nobody uses now, in the order in which they are let go of.

    A tenant is charged for all that it holds, in use or not; what is not in use waits here. The
    next to go is

    1. the least recently used of all, if it was not used for ``PROTECTED_S``; otherwise
    2. the least recently used of the tenant that holds most, of those that have something here.

    So a tenant that holds no more than an equal share of what all hold loses nothing while another
    holds more and has something here. One tenant alone has all, and the least recently used goes.
    Nobody keeps a share by what it left behind long ago.

    Each call takes time by the logarithm of the number of tenants.

    Invariants:
        1. ``_ranking`` has what each tenant with something here holds, and its name, ascending.
        2. The queues of the tenants are what ``_used_at`` has, and in the same order.
        3. A tenant that holds nothing and has nothing here is not known.

    Source: max-min fairness; Bertsekas and Gallager, "Data Networks", section 6.5.2.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty; ``clock`` tells seconds and never goes back."""
        self._clock = clock
        self._holdings: dict[str, _Holding[Key]] = {}
        self._ranking: list[tuple[int, str]] = []
        self._used_at: OrderedDict[Key, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used_at)

    def __contains__(self, key: Key) -> bool:
        return key in self._used_at

    @property
    def charges(self) -> dict[str, int]:
        """What each tenant is charged for, if anything."""
        return {name: one.amount for name, one in self._holdings.items() if one.amount}

    def charge(self, tenant: str, amount: int) -> None:
        """Note that ``tenant`` holds ``amount`` more, or less if it is negative."""
        holding = self._holdings.setdefault(tenant, _Holding())
        if holding.queue:
            self._unrank(tenant, holding)
        holding.amount += amount
        self._settle(tenant, holding)

    def push(self, key: Key, tenant: str) -> None:
        """Let ``key`` of ``tenant`` wait here; it was used just now."""
        holding = self._holdings.setdefault(tenant, _Holding())
        if not holding.queue:
            bisect.insort(self._ranking, (holding.amount, tenant))
        holding.queue[key] = None
        self._used_at[key] = (tenant, self._clock())

    def touch(self, key: Key) -> None:
        """Count ``key``, which is here, as used just now."""
        tenant, _ = self._used_at[key]
        self.remove(key)
        self.push(key, tenant)

    def remove(self, key: Key) -> None:
        """Take ``key``, which is here, out; its tenant holds it still."""
        tenant, _ = self._used_at.pop(key)
        holding = self._holdings[tenant]
        del holding.queue[key]
        if not holding.queue:
            self._unrank(tenant, holding)
            self._settle(tenant, holding)

    def pop(self, tenant: str) -> Key:
        """Take out what is let go of next and return it; who held it holds it still.

        Args:
            tenant: Who needs the room: if it holds as much as any other, it is the one that holds
                most.
        """
        key = self._choose(tenant) if len(self._ranking) > 1 else next(iter(self._used_at))
        self.remove(key)
        return key

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if an invariant does not hold."""
        queued = {name: one for name, one in self._holdings.items() if one.queue}
        assert self._ranking == sorted((one.amount, name) for name, one in queued.items())
        for name, one in queued.items():
            in_order = [key for key, (tenant, _) in self._used_at.items() if tenant == name]
            assert in_order == list(one.queue)
        assert sum(len(one.queue) for one in queued.values()) == len(self._used_at)
        assert all(one.queue or one.amount > 0 for one in self._holdings.values())

    def _choose(self, tenant: str) -> Key:
        oldest, (_, used_at) = next(iter(self._used_at.items()))
        if self._clock() - used_at >= PROTECTED_S:
            return oldest
        most, largest = self._ranking[-1]
        own = self._holdings.get(tenant)
        if own is not None and own.queue and own.amount == most:
            largest = tenant
        return next(iter(self._holdings[largest].queue))

    def _unrank(self, tenant: str, holding: _Holding[Key]) -> None:
        index = bisect.bisect_left(self._ranking, (holding.amount, tenant))
        del self._ranking[index]

    def _settle(self, tenant: str, holding: _Holding[Key]) -> None:
        """Rank the tenant if it has something here; forget it if it has nothing at all."""
        if holding.queue:
            bisect.insort(self._ranking, (holding.amount, tenant))
        elif not holding.amount:
            del self._holdings[tenant]
