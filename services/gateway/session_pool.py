"""Keep one session for each generator, and open it again when it broke."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from chiasm.common.circuit_breaker import BreakerSettings, CircuitBreaker
from chiasm.common.errors import UnavailableError
from chiasm.v1 import generator_pb2_grpc

from .generator_session import GeneratorSession
from .session_call import CallEndedError

if TYPE_CHECKING:
    import grpc

    from chiasm.v1.generator_pb2_grpc import GeneratorServiceAsyncStub

log = structlog.get_logger(__name__)

# Every call has a deadline. New requests go to a new session long before the old one's ends.
_MAX_AGE_S = 24 * 3600.0
_SESSION_TIMEOUT_S = 7 * _MAX_AGE_S


@dataclass(slots=True)
class _Peer:
    """What is kept for one channel: its session, and whether it is worth opening one."""

    session: GeneratorSession | None = None
    breaker: CircuitBreaker = field(default_factory=lambda: CircuitBreaker(BreakerSettings()))


class SessionPool:
    """Sessions by channel, opened at their first request.

    A session that ends before it has answered anything is a failure; after some in a row requests
    are refused for growing pauses instead of opening session after session. That an endpoint is
    down is found out by ``EndpointPool``, whose calls these requests are.
    """

    def __init__(self, max_age_s: float = _MAX_AGE_S) -> None:
        """Keep nothing yet.

        Args:
            max_age_s: Seconds after which new requests go to a new session.
        """
        self._max_age_s = max_age_s
        self._peers: weakref.WeakKeyDictionary[grpc.aio.Channel, _Peer] = (
            weakref.WeakKeyDictionary()
        )
        self._sessions: set[GeneratorSession] = set()

    @property
    def num_sessions(self) -> int:
        """Sessions that are open, retired ones included."""
        return len(self._sessions)

    def get(self, channel: grpc.aio.Channel) -> GeneratorSession:
        """Return the session of a channel, opening one if there is none.

        Raises:
            CallEndedError: The last ones broke at once.
        """
        peer = self._peers.setdefault(channel, _Peer())
        session = peer.session
        if session is not None and session.has_answered:
            peer.breaker.record_success()
        age_s = asyncio.get_running_loop().time() - session.opened_s if session else 0.0
        if session is not None and age_s > self._max_age_s:
            session.retire()
            session = None
        return session or self._open(channel, peer)

    async def close(self) -> None:
        """End all sessions; the requests on them fail."""
        for session in tuple(self._sessions):
            await session.close()

    def _open(self, channel: grpc.aio.Channel, peer: _Peer) -> GeneratorSession:
        if not peer.breaker.admit():
            error = UnavailableError("No generator is serving.", retry_after_s=1.0)
            raise CallEndedError(error, is_away=True)

        def on_end(session: GeneratorSession) -> None:
            self._forget(channel, session)

        stub: GeneratorServiceAsyncStub = generator_pb2_grpc.GeneratorServiceStub(channel)
        session = GeneratorSession(stub.Session(timeout=_SESSION_TIMEOUT_S), on_end)
        peer.session = session
        self._sessions.add(session)
        return session

    def _forget(self, channel: grpc.aio.Channel, session: GeneratorSession) -> None:
        self._sessions.discard(session)
        peer = self._peers[channel]
        if session.has_answered:
            peer.breaker.record_success()
        else:
            peer.breaker.record_failure()
        if peer.session is session:
            peer.session = None
            log.info("session_ended", has_answered=session.has_answered)
