"""Hold what a session brings for one request until its reader takes it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from chiasm.common.errors import DeadlineExceededError

if TYPE_CHECKING:
    from chiasm.common.errors import ChiasmError
    from chiasm.v1 import generator_pb2

    from .generator_session import GeneratorSession

# Tokens on their way or unread. A slow reader stalls only itself: the rest waits, merged, in the
# generator. Two round trips of the fastest models fit in.
WINDOW_TOKENS = 256


class CallEndedError(Exception):
    """A request on a session ended by an error.

    Attributes:
        error: What the client is told.
        is_away: Whether its generator cannot be reached or refuses, so that another may be asked.
    """

    def __init__(self, error: ChiasmError, *, is_away: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_away = is_away


class SessionCall:
    """One request on a ``GeneratorSession``, from its start to ``close``.

    Deltas that the reader has not taken are merged into one, so that a reader that falls behind
    has less to do for each token. Invariant: at most ``WINDOW_TOKENS`` tokens are unread.
    """

    def __init__(
        self, session: GeneratorSession, key: int, deadline_s: float, num_sequences: int = 1
    ) -> None:
        """Wait for the answers of ``num_sequences`` sequences, at most ``deadline_s`` seconds."""
        self._session = session
        self._num_unfinished = num_sequences
        self._key = key
        self._responses: deque[generator_pb2.GenerateResponse] = deque()
        self._end: CallEndedError | None = None
        self._is_expired = False
        self._waiter: asyncio.Future[None] | None = None
        self._num_ungranted = 0
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(deadline_s, self._expire)

    @property
    def has_ended(self) -> bool:
        """Whether the generator has said its last word, read or not."""
        return self._num_unfinished == 0 or self._end is not None

    async def read(self) -> generator_pb2.GenerateResponse | None:
        """Return the next answer of the generator; ``None`` after the last ``finished``.

        Raises:
            CallEndedError: The request or its session failed; answers before that are read first.
        """
        while not self._responses:
            if self._end is not None:
                raise self._end
            if self._num_unfinished == 0:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        response = self._responses.popleft()
        if response.HasField("delta"):
            self._grant(len(response.delta.token_ids))
        return response

    def push(self, response: generator_pb2.GenerateResponse) -> None:
        """Add an answer of the generator; ignored after the end."""
        if self.has_ended:
            return
        kind = response.WhichOneof("message")
        if kind == "delta" and self._responses:
            last = self._responses[-1]
            if last.HasField("delta") and last.delta.index == response.delta.index:
                last.delta.MergeFrom(response.delta)
                return
        self._num_unfinished -= kind == "finished"
        self._responses.append(response)
        self._wake()

    def fail(self, error: ChiasmError, *, is_away: bool) -> None:
        """End the request by ``error``; ignored after the end."""
        if not self.has_ended:
            self._end = CallEndedError(error, is_away=is_away)
            self._wake()

    async def send(self, update: generator_pb2.GenerateRequest) -> None:
        """Tell the generator about an embedding; returns when it is written or of no use."""
        if not self.has_ended:
            await self._session.send_update(self._key, update)

    def half_close(self) -> None:
        """Tell the generator that no embedding will be reported any more."""
        if not self.has_ended:
            self._session.half_close(self._key)

    def stop_answer(self, index: int) -> None:
        """Tell the generator that no more of one answer is wanted; its end comes all the same."""
        if not self.has_ended:
            self._session.stop_answer(self._key, index)

    def close(self) -> None:
        """Leave the session; the generator frees the request's blocks if it has not ended."""
        self._timer.cancel()
        # An end by our own timer is not known to the generator.
        self._session.leave(self._key, is_over=self.has_ended and not self._is_expired)

    def _grant(self, num_tokens: int) -> None:
        self._num_ungranted += num_tokens
        if self._num_ungranted >= WINDOW_TOKENS // 2 and not self.has_ended:
            self._session.grant(self._key, self._num_ungranted)
            self._num_ungranted = 0

    def _expire(self) -> None:
        if not self.has_ended:
            self._is_expired = True
            error = DeadlineExceededError("The deadline passed before the work was done.")
            self.fail(error, is_away=False)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
