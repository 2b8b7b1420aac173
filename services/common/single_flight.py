"""Encode each missing embedding once, however many requests and processes miss it at one time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.lease import LeaseSettings
from chiasm.common.metrics import STORE_FLIGHTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chiasm.common.embedding_store import EmbeddingStore, StoredEmbedding

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Joins callers that want the same embedding: one leads, the others get what it got.

    ::

        run ──┬─ same id in this process ──────────────> the leader's result or error
              └─ first here ─┬─ lease in Redis is ours ─> encode()
                             ├─ another process has it ─> wait ─> StoredEmbedding, or our turn
                             └─ store unavailable ──────> encode()

    Usage in the encoder::

        outcome = await flights.run(tenant, embedding_id, lambda: self._encode_and_put(item))
        if isinstance(outcome, StoredEmbedding): ...  # another process has stored it
    """

    def __init__(self, store: EmbeddingStore, settings: LeaseSettings | None = None) -> None:
        self._store = store
        self._settings = settings or LeaseSettings()
        self._flights: dict[tuple[str, bytes], _Flight[T]] = {}
        self._tasks: set[asyncio.Task[T | StoredEmbedding]] = set()

    async def run(
        self, tenant: str, embedding_id: bytes, encode: Callable[[], Awaitable[T]]
    ) -> T | StoredEmbedding:
        """Return the embedding's outcome, encoding it only if nobody else does.

        ``encode`` runs in a task of its own: a caller that is cancelled leaves the others
        undisturbed, and the last one to leave cancels it.

        Args:
            tenant: Tenant the embedding belongs to.
            embedding_id: Id of the embedding that was missing in the store.
            encode: Encodes and puts; called at most once per flight, and not at all if the
                embedding turns up in the store.

        Returns:
            What ``encode`` returned to the leader of this process, or what the store tells of the
            embedding that another process put there.

        Raises:
            Exception: What ``encode`` raised, in every caller that had joined.
        """
        key = (tenant, embedding_id)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(tenant, embedding_id, encode)
            self._flights[key] = flight
        else:
            STORE_FLIGHTS.labels("joined").inc()
        flight.num_callers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_callers -= 1
            if flight.num_callers == 0:
                # Nobody is left, so a newcomer starts afresh instead of joining a dying flight.
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()

    async def close(self) -> None:
        """Cancel what still runs and return when it has ended and freed its leases."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(
        self, tenant: str, embedding_id: bytes, encode: Callable[[], Awaitable[T]]
    ) -> _Flight[T]:
        task = asyncio.create_task(self._lead(tenant, embedding_id, encode))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _Flight(task)

    async def _lead(
        self, tenant: str, embedding_id: bytes, encode: Callable[[], Awaitable[T]]
    ) -> T | StoredEmbedding:
        lease = self._store.lease(tenant, embedding_id, self._settings)
        try:
            stored = await lease.acquire_unless(lambda: self._store.lookup(tenant, embedding_id))
        except StoreUnavailableError:
            STORE_FLIGHTS.labels("without_store").inc()
            return await encode()
        if stored is not None:
            STORE_FLIGHTS.labels("elsewhere").inc()
            return stored
        STORE_FLIGHTS.labels("led").inc()
        async with lease.hold():
            return await encode()


@dataclass(slots=True)
class _Flight(Generic[T]):
    """A running encode and how many callers wait for it."""

    task: asyncio.Task[T | StoredEmbedding]
    num_callers: int = 0
