"""Translate between the messages of ``Session`` and the domain types of a session."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chiasm.common.errors import ChiasmError, InvalidRequestError
from chiasm.common.rpc_status import details_of
from chiasm.generator.convert import event_to_proto, start_from_proto, update_from_proto
from chiasm.generator.session_messages import (
    CancelRequest,
    GrantCredit,
    HalfClose,
    RefuseRequest,
    StartRequest,
    StopAnswer,
    UpdateSpan,
)
from chiasm.v1 import generator_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from chiasm.generator.session_messages import SessionCommand, SessionEvent


async def read_commands(
    messages: AsyncIterator[generator_pb2.SessionRequest],
) -> AsyncIterator[SessionCommand]:
    """Yield the commands of a session's messages.

    Raises:
        InvalidRequestError: A message is none that a session knows.
    """
    async for message in messages:
        yield command_from_proto(message)


def command_from_proto(message: generator_pb2.SessionRequest) -> SessionCommand:
    """Return the command of a message; a wrong field ends only the request it is about."""
    key = message.request_key
    match message.WhichOneof("message"):
        case "start":
            return _start(key, message.start)
        case "update":
            return _update(key, message.update)
        case "half_close":
            return HalfClose(key)
        case "stop":
            return StopAnswer(key, message.stop.index)
        case "cancel":
            return CancelRequest(key)
        case "credit":
            grants = message.credit.grants
            return GrantCredit(tuple((grant.request_key, grant.num_tokens) for grant in grants))
        case _:
            raise InvalidRequestError("A message of Session carries nothing.", param="message")


def batch_to_proto(events: Iterable[SessionEvent]) -> generator_pb2.StepBatch:
    """Return the message of ``events``."""
    return generator_pb2.StepBatch(events=[_event(event) for event in events])


def _start(key: int, message: generator_pb2.SessionStart) -> SessionCommand:
    try:
        request = start_from_proto(message.start)
        if not (math.isfinite(message.deadline_s) and message.deadline_s > 0):
            raise InvalidRequestError("A deadline must be above 0 seconds.", param="deadline_s")
        if not message.num_credit_tokens:
            raise InvalidRequestError("A request needs credit.", param="num_credit_tokens")
    except ChiasmError as error:
        return RefuseRequest(key, error)
    return StartRequest(
        key=key,
        request=request,
        deadline_s=message.deadline_s,
        num_credit_tokens=message.num_credit_tokens,
        is_half_closed=message.is_half_closed,
    )


def _update(key: int, message: generator_pb2.GenerateRequest) -> SessionCommand:
    try:
        return UpdateSpan(key, update_from_proto(message))
    except ChiasmError as error:
        return RefuseRequest(key, error)


def _event(event: SessionEvent) -> generator_pb2.SessionEvent:
    if isinstance(event.event, ChiasmError):
        return generator_pb2.SessionEvent(request_key=event.key, error=details_of(event.event))
    response = event_to_proto(event.event)
    return generator_pb2.SessionEvent(request_key=event.key, response=response)
