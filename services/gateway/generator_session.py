"""Carry all requests to one generator over one call."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import structlog

from chiasm.common.errors import ChiasmError, TooLargeError, UnavailableError
from chiasm.common.grpc_channel import DEFAULT_MAX_MESSAGE_BYTES
from chiasm.common.grpc_client import error_from_rpc
from chiasm.common.grpc_stream import finish_sending, send
from chiasm.common.rpc_status import code_of, error_from_details
from chiasm.v1 import generator_pb2

from .session_call import WINDOW_TOKENS, CallEndedError, SessionCall

if TYPE_CHECKING:
    from collections.abc import Callable

    SessionRpc = grpc.aio.StreamStreamCall[generator_pb2.SessionRequest, generator_pb2.StepBatch]


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message and what its sender waits for, if it waits."""

    message: generator_pb2.SessionRequest
    written: asyncio.Future[None] | None


class GeneratorSession:
    """One ``Session`` call, shared by many requests.

    ::

        start, ready, failed, half_close, stop, cancel ──► control ─┐
        credit of all requests ──────────────────────────► grants ──┼─writer─► the call
        chunks ──────────────────────────────────────────► chunks ──┘
        the call ─reader─► the ``SessionCall`` of each event

    Chunks yield to everything else, so that no request waits for more than one chunk of another.
    Senders of control messages and chunks wait until theirs is written, which bounds both queues.

    When the call ends, every request on it fails with what it ended by.
    """

    def __init__(self, rpc: SessionRpc, on_end: Callable[[GeneratorSession], None]) -> None:
        """Serve ``rpc``; needs a running event loop.

        Args:
            rpc: The call, just started.
            on_end: Called once, when it has ended.
        """
        self._rpc = rpc
        self._on_end = on_end
        self._calls: dict[int, SessionCall] = {}
        self._last_key = 0
        self._control: deque[_Outgoing] = deque()
        self._chunks: deque[_Outgoing] = deque()
        self._grants: dict[int, int] = {}
        self._has_work = asyncio.Event()
        self._is_retired = False
        self._writer = asyncio.create_task(self._write(), name="session writer")
        self._reader = asyncio.create_task(self._read(), name="session reader")
        for task in (self._writer, self._reader):
            task.add_done_callback(self._check)
        self.is_over = False
        self.has_answered = False
        self.opened_s = asyncio.get_running_loop().time()

    @property
    def num_calls(self) -> int:
        """Requests that have not left."""
        return len(self._calls)

    def start(
        self, start: generator_pb2.GenerateStart, deadline_s: float, *, is_half_closed: bool
    ) -> SessionCall:
        """Start a request; nothing of it is awaited here.

        Args:
            start: The prompt.
            deadline_s: Seconds that the request may take.
            is_half_closed: Whether no embedding will be reported.

        Returns:
            The request, which the caller must close.

        Raises:
            CallEndedError: The session is over.
            TooLargeError: The request is over the limit of one message.
        """
        if self.is_over:
            raise CallEndedError(_broken_off(), is_away=True)
        self._last_key += 1
        key = self._last_key
        message = generator_pb2.SessionRequest(
            request_key=key,
            start=generator_pb2.SessionStart(
                start=start,
                deadline_s=deadline_s,
                num_credit_tokens=WINDOW_TOKENS,
                is_half_closed=is_half_closed,
            ),
        )
        if message.ByteSize() > DEFAULT_MAX_MESSAGE_BYTES:
            # The generator would end the session by it, and with it all other requests.
            raise TooLargeError("A message is over the limit of bytes.")
        num_sequences = start.sampling.num_sequences or 1
        call = SessionCall(self, key, deadline_s, num_sequences)
        self._calls[key] = call
        self._post(message)
        return call

    async def send_update(self, key: int, update: generator_pb2.GenerateRequest) -> None:
        """Tell a request something about an embedding; returns when it is written or of no use."""
        if self.is_over:
            return
        message = generator_pb2.SessionRequest(request_key=key, update=update)
        outgoing = _Outgoing(message, asyncio.get_running_loop().create_future())
        queue = self._chunks if update.HasField("chunk") else self._control
        queue.append(outgoing)
        self._has_work.set()
        assert outgoing.written is not None, "made above"
        await outgoing.written

    def half_close(self, key: int) -> None:
        """Tell a request that no embedding will be reported any more."""
        half_close = generator_pb2.SessionHalfClose()
        self._post(generator_pb2.SessionRequest(request_key=key, half_close=half_close))

    def stop_answer(self, key: int, index: int) -> None:
        """Tell a request that no more of one of its answers is wanted."""
        stop = generator_pb2.SessionStop(index=index)
        self._post(generator_pb2.SessionRequest(request_key=key, stop=stop))

    def grant(self, key: int, num_tokens: int) -> None:
        """Let ``num_tokens`` more of a request come."""
        self._grants[key] = self._grants.get(key, 0) + num_tokens
        self._has_work.set()

    def leave(self, key: int, *, is_over: bool) -> None:
        """Forget a request; the generator is told unless it knows that the request is over."""
        if self._calls.pop(key, None) is None:
            return
        self._grants.pop(key, None)
        if not is_over:
            cancel = generator_pb2.SessionCancel()
            self._post(generator_pb2.SessionRequest(request_key=key, cancel=cancel))
        self._has_work.set()

    def retire(self) -> None:
        """End the call after the last of its requests; none is started any more."""
        self._is_retired = True
        self._has_work.set()

    async def close(self) -> None:
        """End the call; the requests on it fail."""
        self._rpc.cancel()
        self._reader.cancel()
        await asyncio.wait([self._reader, self._writer])
        if not self.is_over:  # cancelled before it began
            self._end(_broken_off(), is_away=True)

    def _post(self, message: generator_pb2.SessionRequest) -> None:
        if not self.is_over:
            self._control.append(_Outgoing(message, None))
            self._has_work.set()

    async def _write(self) -> None:
        while True:
            outgoing = self._next()
            if outgoing is not None:
                # A call that has ended takes nothing; the reader learns why.
                try:
                    await send(self._rpc, outgoing.message)
                finally:
                    _settle(outgoing)
            elif self._is_retired and not self._calls:
                await finish_sending(self._rpc)
                return
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _next(self) -> _Outgoing | None:
        if self._control:
            return self._control.popleft()
        if self._grants:
            grants = [
                generator_pb2.CreditGrant(request_key=key, num_tokens=num_tokens)
                for key, num_tokens in self._grants.items()
            ]
            self._grants.clear()
            credit = generator_pb2.SessionCredit(grants=grants)
            return _Outgoing(generator_pb2.SessionRequest(credit=credit), None)
        while self._chunks:
            chunk = self._chunks.popleft()
            if chunk.written is not None and not chunk.written.cancelled():
                return chunk
        return None

    async def _read(self) -> None:
        error, is_away = _broken_off(), True
        try:
            while isinstance(batch := await self._rpc.read(), generator_pb2.StepBatch):
                self.has_answered = True
                self._dispatch(batch)
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            is_away = failure.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            self._end(error, is_away=is_away)

    def _check(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("session_crashed", exc_info=error)
            self._rpc.cancel()

    def _dispatch(self, batch: generator_pb2.StepBatch) -> None:
        for event in batch.events:
            call = self._calls.get(event.request_key)
            if call is None:
                continue
            if event.HasField("response"):
                call.push(event.response)
            else:
                error = error_from_details(event.error)
                call.fail(error, is_away=code_of(error) is grpc.StatusCode.UNAVAILABLE)

    def _end(self, error: ChiasmError, *, is_away: bool) -> None:
        self.is_over = True
        self._writer.cancel()
        for outgoing in (*self._control, *self._chunks):
            _settle(outgoing)
        self._control.clear()
        self._chunks.clear()
        for call in self._calls.values():
            call.fail(error, is_away=is_away)
        self._on_end(self)


def _settle(outgoing: _Outgoing) -> None:
    if outgoing.written is not None and not outgoing.written.done():
        outgoing.written.set_result(None)


def _broken_off() -> ChiasmError:
    return UnavailableError("The generator broke off.")
