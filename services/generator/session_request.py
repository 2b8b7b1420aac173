"""Keep the state of one request of a session: its generation, its credit, its deadline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.engine.outputs import Finished, TokenDelta
from chiasm.generator.generation import Admitted
from chiasm.generator.update_inbox import UpdateInbox

if TYPE_CHECKING:
    import asyncio

    from chiasm.generator.generation import Generation, GenerationEvent
    from chiasm.generator.session_messages import StartRequest

MAX_CREDIT_TOKENS = 1 << 16


class SessionRequest:
    """One request between its start and its last event; belongs to the event loop.

    ::

        starting ──admitted──► running ──finished, error, cancel──► closed
            └────────────────────refused, cancel──────────────────────┘

    Invariant: tokens are taken only against credit, one for one.
    """

    def __init__(self, command: StartRequest) -> None:
        request = command.request
        self.key = command.key
        self.request_id = request.context.request_id
        self.inbox = UpdateInbox(sum(span.ref.num_bytes for span in request.spans))
        self.timer: asyncio.TimerHandle | None = None
        self.starting: asyncio.Task[None] | None = None
        self._generation: Generation | None = None
        self._is_announced = False
        self._num_credit_tokens = 0
        self.grant(command.num_credit_tokens)
        if command.is_half_closed:
            self.inbox.close()

    @property
    def generation(self) -> Generation | None:
        """The running generation; ``None`` before the engine has it."""
        return self._generation

    @property
    def is_over(self) -> bool:
        """Whether the end of each of its sequences has been taken."""
        return self._generation is not None and self._generation.stream.is_over

    def begin(self, generation: Generation) -> None:
        """Note that the engine has the request."""
        self._generation = generation

    def grant(self, num_tokens: int) -> None:
        """Let ``num_tokens`` more be taken."""
        self._num_credit_tokens = min(self._num_credit_tokens + num_tokens, MAX_CREDIT_TOKENS)

    def take(self, max_tokens: int) -> GenerationEvent | None:
        """Return the next event that may be sent now; ``None`` if there is none.

        Raises:
            Exception: What ended the sequence.
        """
        if self._generation is None:
            return None
        stream = self._generation.stream
        if not self._is_announced:
            self._is_announced = True
            return Admitted(stream.seq_id)
        event = stream.take(min(self._num_credit_tokens, max_tokens))
        if isinstance(event, TokenDelta):
            self._num_credit_tokens -= len(event.token_ids)
        elif isinstance(event, Finished):
            self._generation.log_finished(event)
        return event

    def stop_timer(self) -> None:
        """Let the deadline pass without consequence."""
        if self.timer is not None:
            self.timer.cancel()
