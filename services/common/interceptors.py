"""Server interceptors: translate errors, check the service token."""

from __future__ import annotations

import inspect
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import structlog

from chiasm.common.errors import ChiasmError, UnauthenticatedError
from chiasm.common.logging import current_request_id
from chiasm.common.rpc_status import (
    DETAILS_METADATA_KEY,
    SERVICE_TOKEN_REASON,
    code_of,
    details_of,
    internal_error,
)
from chiasm.common.service_token import TOKEN_METADATA_KEY, is_same_token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = grpc.RpcMethodHandler[Any, Any]
    Behavior = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]

HEALTH_METHOD_PREFIX = "/grpc.health.v1.Health/"

log = structlog.get_logger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turn what a servicer raises into a status; servicers have no try/except of their own.

    A ``ChiasmError`` becomes its code with details. Anything else is a bug: INTERNAL with a fixed
    text and the request id, the traceback in the log. Cancellation and ``context.abort`` pass.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        return _wrap(handler, lambda behavior: _translate(behavior, method))


class ServiceTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuse calls that do not show the stack's service token; health checks need none."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Return the call's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(HEALTH_METHOD_PREFIX):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        shown = metadata.get(TOKEN_METADATA_KEY, "")
        if isinstance(shown, str) and is_same_token(self._token, shown):
            return handler
        log.warning("service_token_refused", method=handler_call_details.method)
        return _wrap(handler, lambda _behavior: _refuse)


def public_error(error: Exception, method: str, request_id: str | None = None) -> ChiasmError:
    """Return what a caller may see of ``error``; what is not ours is a bug and goes to the log.

    Args:
        error: What a request failed by.
        method: What was called, for the log.
        request_id: Id of the request; ``None`` takes the one bound to the task.
    """
    if isinstance(error, ChiasmError):
        return error
    request_id = request_id or current_request_id() or uuid.uuid4().hex
    log.error("rpc_failed", method=method, request_id=request_id, exc_info=error)
    return internal_error(request_id)


async def _refuse(_request: object, _context: object) -> NoReturn:
    raise UnauthenticatedError(
        "This port is internal; show the service token.", reason=SERVICE_TOKEN_REASON
    )


def _wrap(handler: Handler | None, wrap: Callable[[Behavior], Behavior]) -> Handler | None:
    """Return a handler of the same kind whose behaviour went through ``wrap``.

    ``None``, an unknown method, stays ``None``; grpc answers UNIMPLEMENTED.
    """
    if handler is None:
        return None
    make: Callable[..., Handler]
    behavior: Any  # the stubs of grpc know only behaviours of synchronous servers
    if handler.request_streaming and handler.response_streaming:
        behavior, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
    elif handler.request_streaming:
        behavior, make = handler.stream_unary, grpc.stream_unary_rpc_method_handler
    elif handler.response_streaming:
        behavior, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
    else:
        behavior, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
    assert behavior is not None, "a handler has the behaviour of its kind"
    return make(wrap(behavior), handler.request_deserializer, handler.response_serializer)


def _translate(behavior: Behavior, method: str) -> Behavior:
    """Return ``behavior`` with its errors translated; a generator stays a generator."""
    if inspect.isasyncgenfunction(behavior):

        async def stream(
            request: object, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[object]:
            try:
                # A cancelled call ends its servicer now, not when garbage is collected.
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await _abort(error, context, method)

        return stream

    async def call(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        try:
            return await behavior(request, context)
        except Exception as error:
            await _abort(error, context, method)

    return call


async def _abort(
    error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    shown = public_error(error, method)
    # gRPC keeps what abort raises, and with it its context, for as long as it keeps the call: the
    # frames behind an error would keep the request's media.
    error.with_traceback(None).__context__ = None
    error.__cause__ = None
    await context.abort(code_of(shown), shown.message, ((DETAILS_METADATA_KEY, details_of(shown)),))
