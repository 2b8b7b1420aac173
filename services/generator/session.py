"""Carry many requests over one call, with one batch of events per engine step."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from chiasm.common.errors import (
    ChiasmError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
)
from chiasm.common.interceptors import public_error
from chiasm.generator.engine.outputs import Finished, PromptLogprobs, TokenDelta
from chiasm.generator.session_messages import (
    CancelRequest,
    GrantCredit,
    HalfClose,
    RefuseRequest,
    SessionEvent,
    StartRequest,
    StopAnswer,
    UpdateSpan,
)
from chiasm.generator.session_request import SessionRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine

    from chiasm.generator.generation import GenerationService
    from chiasm.generator.session_messages import SessionCommand

MAX_REQUESTS = 4096
MAX_BATCH_TOKENS = 1 << 14

_METHOD = "Session"


class Session:
    """The requests of one caller, from its first to the end of its call.

    ::

        commands ──reader──► requests ──engine steps mark them──► fresh ──collect──► batches

    An engine step delivers to all its sequences in one go, so all of its events are collected
    together. While the caller is slow to take a batch, later steps merge in the streams. A request
    without credit is looked at again when credit comes.

    Invariant: ``_fresh`` names every request of which something could be sent.
    """

    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._requests: dict[int, SessionRequest] = {}
        # Dictionaries keep the order in which requests had news.
        self._fresh: dict[int, None] = {}
        self._errors: list[SessionEvent] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_news = asyncio.Event()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    async def run(
        self, commands: AsyncIterator[SessionCommand]
    ) -> AsyncGenerator[list[SessionEvent], None]:
        """Yield what happens to the requests that ``commands`` start, batch by batch.

        Ends when the commands have ended, or the service drains, and no request is left. Closing
        the generator, or cancelling its task, cancels all requests and frees their blocks.

        Raises:
            InvalidRequestError: A command makes no sense; all requests are cancelled.
        """
        reader = self._watch(self._follow(commands))
        drain = self._watch(self._service.wait_draining())
        try:
            while True:
                self._has_news.clear()
                events = self._collect()
                if events:
                    yield events
                    continue
                if reader.done():
                    reader.result()
                if not self._requests and (reader.done() or drain.done()):
                    return
                await self._has_news.wait()
        finally:
            reader.cancel()
            drain.cancel()
            for request in list(self._requests.values()):
                self._close(request)
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _watch(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._spawn(work)
        task.add_done_callback(lambda _: self._has_news.set())
        return task

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(self, commands: AsyncIterator[SessionCommand]) -> None:
        async for command in commands:
            self._do(command)

    def _do(self, command: SessionCommand) -> None:
        match command:
            case StartRequest():
                self._start(command)
            case GrantCredit():
                for key, num_tokens in command.grants:
                    if request := self._requests.get(key):
                        request.grant(num_tokens)
                        self._mark(key)
            case RefuseRequest():
                self._fail(command.key, command.error)
            case UpdateSpan() | HalfClose() | StopAnswer() | CancelRequest():
                if request := self._requests.get(command.key):
                    self._tell(request, command)

    def _tell(
        self, request: SessionRequest, command: UpdateSpan | HalfClose | StopAnswer | CancelRequest
    ) -> None:
        match command:
            case UpdateSpan():
                try:
                    request.inbox.put(command.update)
                except InvalidRequestError as error:
                    self._fail(request.key, error)
            case HalfClose():
                request.inbox.close()
            case StopAnswer():
                if request.generation is not None:
                    request.generation.stop(command.index)
            case CancelRequest():
                self._close(request)

    def _start(self, command: StartRequest) -> None:
        key = command.key
        if key in self._requests:
            raise InvalidRequestError("The key of a request is in use.", param="request_key")
        if len(self._requests) >= MAX_REQUESTS:
            error = OverloadedError(
                f"A session carries at most {MAX_REQUESTS} requests.", retry_after_s=1.0
            )
            self._fail(key, error)
            return
        request = SessionRequest(command)
        self._requests[key] = request
        loop = asyncio.get_running_loop()
        request.timer = loop.call_later(command.deadline_s, self._expire, key)
        request.starting = self._spawn(self._admit(request, command))

    async def _admit(self, request: SessionRequest, command: StartRequest) -> None:
        try:
            generation = await self._service.start(command.request, aiter(request.inbox))
        except Exception as error:  # top of a background task: ends the request
            request.starting = None
            self._fail(request.key, public_error(error, _METHOD, request.request_id))
            return
        request.begin(generation)
        generation.stream.listen(partial(self._mark, request.key))
        self._mark(request.key)

    def _mark(self, key: int) -> None:
        self._fresh[key] = None
        self._has_news.set()

    def _collect(self) -> list[SessionEvent]:
        """Take what may be sent now, at most about ``MAX_BATCH_TOKENS`` tokens of it."""
        events, self._errors = self._errors, []
        room = MAX_BATCH_TOKENS
        while self._fresh and room > 0:
            key = next(iter(self._fresh))
            del self._fresh[key]
            if request := self._requests.get(key):
                room -= self._take(request, events, room)
        return events

    def _take(self, request: SessionRequest, events: list[SessionEvent], room: int) -> int:
        """Add the events of one request to ``events``; return how many tokens they hold."""
        num_tokens = 0
        try:
            while num_tokens < room and (event := request.take(room - num_tokens)) is not None:
                events.append(SessionEvent(request.key, event))
                if isinstance(event, TokenDelta):
                    num_tokens += len(event.token_ids)
                elif isinstance(event, PromptLogprobs):
                    num_tokens += len(event.logprobs)
                elif isinstance(event, Finished) and request.is_over:
                    self._close(request)
                    return num_tokens
        except Exception as error:  # what ended the sequence, of any class
            shown = public_error(error, _METHOD, request.request_id)
            events.append(SessionEvent(request.key, shown))
            self._close(request)
            return num_tokens
        if num_tokens >= room:
            self._fresh[request.key] = None
        return num_tokens

    def _expire(self, key: int) -> None:
        self._fail(key, DeadlineExceededError("The deadline passed before the work was done."))

    def _fail(self, key: int, error: ChiasmError) -> None:
        """End a request by ``error`` at once; tokens of it that were not sent are lost."""
        if request := self._requests.get(key):
            self._close(request)
        self._errors.append(SessionEvent(key, error))
        self._has_news.set()

    def _close(self, request: SessionRequest) -> None:
        """Forget a request; the engine is told now, its tracker ends in the background."""
        del self._requests[request.key]
        request.stop_timer()
        if request.generation is not None:
            self._spawn(request.generation.close())
        elif request.starting is not None:
            request.starting.cancel()
