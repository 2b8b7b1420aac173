"""Call Redis so that nothing hangs: explicit timeouts, a deadline per call, a circuit breaker.

A call that stalls opens the breaker at once, and calls are refused until Redis has answered a probe
that nobody waits for: a hung Redis costs a process one budget, a slow moment a few milliseconds of
refusals. Whatever goes wrong leaves as a ``StoreUnavailableError`` within the call's budget.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chiasm.common.bulk_redis import BulkRedis
from chiasm.common.circuit_breaker import BreakerSettings, CircuitBreaker
from chiasm.common.errors import StoreUnavailableError
from chiasm.common.metrics import STORE_BYPASSES
from chiasm.common.redis_address import RedisAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from redis.asyncio.client import Pipeline, PubSub

    from chiasm.common.resp_connection import KeyedChunk

T = TypeVar("T")
Command: TypeAlias = "tuple[str | bytes | memoryview | int, ...]"
Reply: TypeAlias = "bytes | int | bool | None"

# Redis that comes back, after however long, is used again within 3 s: pause and one failing probe.
STORE_BREAKER = BreakerSettings(longest_open_s=2.0)

_MAX_LOGGED_CHARS = 200
_RETRY_AFTER_S = 1.0
_MIN_PAUSE_S = 0.01

log = structlog.get_logger(__name__)


class StoreRefusedError(StoreUnavailableError):
    """Redis is there but refuses the command: full, read-only, or not allowed."""


@dataclass(frozen=True, slots=True)
class CallBudget:
    """How long Redis may take before it counts as unavailable, and how much is sent at once.

    Attributes:
        stall_s: Seconds without progress: until a connection stands, until one reply has come.
        base_s: Seconds that any call may take in all, however few bytes it moves.
        bytes_per_s: Slowest transfer that is waited for, beyond ``base_s``.
        max_calls: Commands or pipelines on their way at one time; others queue.
        max_transfers: Embeddings on their way at one time; others queue before their time starts.
    """

    stall_s: float = 0.25
    base_s: float = 0.25
    bytes_per_s: float = 100e6
    max_calls: int = 32
    max_transfers: int = 2

    @classmethod
    def of(cls, timeout_s: float) -> CallBudget:
        """Return the budget of services that are told to wait ``timeout_s`` for a reply."""
        return cls(stall_s=timeout_s, base_s=timeout_s)

    def total_s(self, num_bytes: int) -> float:
        """Return the seconds that a call moving ``num_bytes`` may take in all."""
        return self.base_s + num_bytes / self.bytes_per_s


class GuardedRedis:
    """A Redis client whose every call ends within its budget.

    Commands go through redis-py; chunks of embeddings through ``BulkRedis``, on connections of
    their own. Both fail alike and share the breaker.
    """

    def __init__(
        self, client: Redis, bulk: BulkRedis, budget: CallBudget, breaker: CircuitBreaker
    ) -> None:
        self._client = client
        self._bulk = bulk
        self._budget = budget
        self._breaker = breaker
        self._calls = asyncio.Semaphore(budget.max_calls)
        self._transfers = asyncio.Semaphore(budget.max_transfers)
        self._prober: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    def connect(
        cls, url: str, budget: CallBudget, breaker: CircuitBreaker | None = None
    ) -> GuardedRedis:
        """Return a client for ``url``; connections are made when the first call needs one."""
        client = Redis.from_url(
            url,
            socket_connect_timeout=budget.stall_s,
            socket_timeout=budget.stall_s,
            # Its name and version, which it tells otherwise, take a command more than we need.
            driver_info=None,
            # One immediate retry replaces a pooled connection that a restart of Redis has closed.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
        bulk = BulkRedis(RedisAddress.parse(url), budget.stall_s, budget.max_transfers)
        return cls(client, bulk, budget, breaker or CircuitBreaker(STORE_BREAKER))

    async def execute(self, commands: Sequence[Command]) -> list[Reply]:
        """Send ``commands`` in one pipeline and return their replies in order.

        Args:
            commands: Commands with one key each; they are not atomic together.

        Returns:
            One reply per command; ``None`` where the key holds another type than expected.

        Raises:
            StoreRefusedError: Redis refused one of them; others may have been carried out.
            StoreUnavailableError: No answer within the budget, or the breaker is open.
        """

        async def run() -> list[Reply | Exception]:
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return cast("list[Reply | Exception]", await pipeline.execute(raise_on_error=False))

        replies = await self._guard(run, num_bytes=0)
        return [_checked(reply) for reply in replies]

    async def write_chunks(
        self, chunks: Sequence[KeyedChunk], ttl_ms: int, note: Callable[[int], None]
    ) -> None:
        """Store ``chunks`` for ``ttl_ms`` milliseconds; see ``RespConnection.write``.

        Raises:
            StoreRefusedError: Redis refused one of them; others may have been stored.
            StoreUnavailableError: As ``execute``.
        """
        write = partial(self._bulk.write, chunks, ttl_ms, note)
        await self._guard(write, _num_bytes(chunks))

    async def read_chunks(
        self, chunks: Sequence[KeyedChunk], ttl_ms: int, accept: Callable[[int], bool]
    ) -> bool:
        """Read ``chunks`` and renew their time; see ``RespConnection.read``.

        Raises:
            StoreUnavailableError: As ``execute``.
        """
        read = partial(self._bulk.read, chunks, ttl_ms, accept)
        return await self._guard(read, _num_bytes(chunks))

    async def execute_if(self, key: str, expected: bytes, command: Command) -> bool:
        """Run ``command`` on ``key`` if its value still begins with ``expected``; tell whether.

        Raises:
            StoreUnavailableError: As ``execute``; then the command may have been carried out.
        """

        async def run() -> bool:
            async with self._client.pipeline(transaction=True) as pipeline:
                await pipeline.watch(key)
                if await _begin_of(pipeline, key, len(expected)) != expected:
                    return False
                pipeline.multi()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
                pipeline.execute_command(*command)
                try:
                    await pipeline.execute()
                except WatchError:
                    return False
                return True

        return await self._guard(run, len(expected))

    async def scan(self, cursor: int, pattern: str, count: int) -> tuple[int, list[bytes]]:
        """Take one step over all keys; return the next cursor, 0 at the end, and matching keys.

        A key may come twice; one that is there from the first step to the last comes at least once.

        Args:
            cursor: 0 to begin, then what the step before returned.
            pattern: Glob pattern of the keys wanted.
            count: About how many keys Redis looks at.

        Raises:
            StoreUnavailableError: As ``execute``.
        """

        async def run() -> tuple[int, list[bytes]]:
            position, keys = await self._client.scan(cursor, match=pattern, count=count)
            # The client does not decode what it reads, which its types do not tell.
            return int(position), cast("list[bytes]", keys)

        return await self._guard(run, 0)

    @asynccontextmanager
    async def transfer(self, num_bytes: int) -> AsyncIterator[None]:
        """Bound everything inside to the budget of one transfer of ``num_bytes``.

        Transfers over the limit wait for their turn first; that wait is not part of the budget,
        for it says nothing about Redis.

        Raises:
            StoreUnavailableError: The time is over; what was in flight has been cancelled.
        """
        async with self._transfers:
            try:
                async with asyncio.timeout(self._budget.total_s(num_bytes)):
                    yield
            except TimeoutError:
                self._fail("slow")
                raise _unavailable("The embedding store is too slow.") from None

    @asynccontextmanager
    async def subscribed(self, channel: str) -> AsyncIterator[PubSub]:
        """Listen to ``channel`` inside, on a connection of its own; the caller bounds its waits.

        Raises:
            StoreUnavailableError: As ``execute``.
        """
        async with self._client.pubsub(ignore_subscribe_messages=True) as listener:
            await self._guard(partial(listener.subscribe, channel), 0)
            yield listener

    async def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        self._bulk.close()
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.wait([self._prober])
        await self._client.aclose()

    async def _guard(self, operation: Callable[[], Awaitable[T]], num_bytes: int) -> T:
        async with self._calls:
            if self._breaker.is_open:
                STORE_BYPASSES.labels("breaker").inc()
                raise _unavailable("The embedding store is unavailable.")
            try:
                async with _heeded_cancellation(), asyncio.timeout(self._budget.total_s(num_bytes)):
                    result = await operation()
            except (TimeoutError, RedisTimeoutError) as error:
                self._fail("timeout")
                raise _unavailable("The embedding store does not answer.") from error
            except ResponseError as error:
                self._succeed()
                raise _refusal(error) from error
            except (RedisError, OSError) as error:
                self._fail("connection")
                raise _unavailable("The embedding store is unreachable.") from error
            self._succeed()
            return result

    def _fail(self, why: str) -> None:
        STORE_BYPASSES.labels(why).inc()
        was_open = self._breaker.is_open
        self._breaker.record_failure()
        if why != "connection":
            self._breaker.trip()
        if self._breaker.is_open and not was_open:
            log.warning("store_breaker_opened", why=why)
            if self._prober is not None:
                self._prober.cancel()
            self._prober = asyncio.create_task(self._probe(), name="store probe")

    async def _probe(self) -> None:
        """Ask Redis whether it is there, now and then, until it answers or a late call did."""
        # A call that fails behind ``close`` begins to probe, too.
        while self._breaker.is_open and not self._is_closed:
            if not self._breaker.admit():
                await asyncio.sleep(max(self._breaker.probe_in_s, _MIN_PAUSE_S))
                continue
            try:
                async with _heeded_cancellation(), asyncio.timeout(self._budget.total_s(0)):
                    await self._client.ping()
            except (TimeoutError, RedisError, OSError):
                self._breaker.record_failure()
            else:
                log.info("store_breaker_closed")
                self._breaker.recover()

    def _succeed(self) -> None:
        if self._breaker.is_open:
            log.info("store_breaker_closed")
        self._breaker.record_success()


@asynccontextmanager
async def _heeded_cancellation() -> AsyncIterator[None]:
    """Let a cancellation that comes inside through, whatever redis-py makes of it.

    It sends with ``asyncio.wait_for``, which in Python 3.11 forgets a cancellation that comes when
    all is sent, and may turn one into an error of its own. The task would go on, and whoever has
    cancelled it would wait for its end.
    """
    task = asyncio.current_task()
    assert task is not None, "the caller is a coroutine"
    num_before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > num_before:
            raise asyncio.CancelledError


def _num_bytes(chunks: Sequence[KeyedChunk]) -> int:
    return sum(chunk.memory.nbytes for chunk in chunks)


async def _begin_of(pipeline: Pipeline, key: str, num_bytes: int) -> Reply:
    # A watching pipeline answers at once instead of queueing, which its types do not tell.
    reply = pipeline.execute_command("GETRANGE", key, 0, num_bytes - 1)
    return cast("Reply", await cast("Awaitable[object]", reply))


def _checked(reply: Reply | Exception) -> Reply:
    if not isinstance(reply, Exception):
        return reply
    if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
        return None
    raise _refusal(reply) from reply


def _refusal(error: Exception) -> StoreRefusedError:
    STORE_BYPASSES.labels("refused").inc()
    log.warning("store_refused_command", error=str(error)[:_MAX_LOGGED_CHARS])
    return StoreRefusedError("The embedding store refuses commands.", retry_after_s=_RETRY_AFTER_S)


def _unavailable(message: str) -> StoreUnavailableError:
    return StoreUnavailableError(message, retry_after_s=_RETRY_AFTER_S)
