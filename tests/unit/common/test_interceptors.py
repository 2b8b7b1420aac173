"""What a servicer raises, as its caller sees it, over real servers on loopback."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import structlog

from chiasm.common.errors import GRPC_STATUS, ChiasmError, InvalidRequestError, UnavailableError
from chiasm.common.grpc_client import error_from_rpc, open_channel
from tests.fakes.echo_server import TOKEN, EchoServer, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KINDS = ("Unary", "Stream", "Collect", "Duplex")
Context = grpc.aio.ServicerContext[bytes, bytes]


class Raise:
    """Raises whatever it was given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    async def __call__(self, request: bytes, _context: Context) -> bytes:
        """Raise the error, or answer if there is none."""
        if self.error is not None:
            raise self.error
        return request


@pytest.fixture
async def server() -> AsyncIterator[EchoServer]:
    server = EchoServer(Raise())
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: EchoServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(server.address, TOKEN) as channel:
        yield channel


async def fail(channel: grpc.aio.Channel, kind: str, **options: Any) -> grpc.aio.AioRpcError:
    """Call a method that is expected to fail; return how."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, kind, **options)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error_class", GRPC_STATUS)
async def test_every_error_maps_to_its_code_and_comes_back_whole(
    server: EchoServer, channel: grpc.aio.Channel, error_class: type[ChiasmError], kind: str
) -> None:
    sent = error_class("What is wrong.", reason="SOME_REASON", param="a[0].b", retry_after_s=2.5)
    server.act = Raise(sent)

    raised = await fail(channel, kind)

    assert raised.code() is GRPC_STATUS[error_class]
    assert raised.details() == "What is wrong."
    back = error_from_rpc(raised)
    assert type(back) is error_class
    assert vars(back) == vars(sent)


@pytest.mark.parametrize("kind", KINDS)
async def test_bug_becomes_a_fixed_text_with_the_request_id_and_a_traceback_in_the_log(
    server: EchoServer, channel: grpc.aio.Channel, kind: str
) -> None:
    server.act = Raise(RuntimeError("secret path /srv/model at 0x7f00deadbeef"))

    with structlog.testing.capture_logs() as lines:
        raised = await fail(channel, kind)

    error = error_from_rpc(raised)
    failed = next(line for line in lines if line["event"] == "rpc_failed")
    assert raised.code() is grpc.StatusCode.INTERNAL
    assert type(error) is ChiasmError
    assert "secret" not in error.message
    assert failed["request_id"] in error.message
    assert failed["exc_info"] is server.act.error


class Picture:
    """Stands for what a request holds in memory."""


@pytest.mark.parametrize("kind", KINDS)
async def test_failed_call_holds_nothing_that_the_collector_would_have_to_find(
    server: EchoServer, channel: grpc.aio.Channel, kind: str
) -> None:
    freed = asyncio.Event()

    async def refuse(_request: bytes, _context: Context) -> bytes:
        picture = Picture()
        weakref.finalize(picture, freed.set)
        try:
            raise ValueError("broken")
        except ValueError as error:
            raise InvalidRequestError("The picture is broken.") from error

    server.act = refuse
    gc.disable()
    try:
        await fail(channel, kind)
        await asyncio.wait_for(freed.wait(), 5)
    finally:
        gc.enable()

    assert freed.is_set()


@pytest.mark.parametrize("kind", KINDS)
async def test_abort_by_the_servicer_passes_unchanged(
    server: EchoServer, channel: grpc.aio.Channel, kind: str
) -> None:
    async def abort(_request: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.ABORTED, "on purpose")

    server.act = abort

    raised = await fail(channel, kind)

    assert (raised.code(), raised.details()) == (grpc.StatusCode.ABORTED, "on purpose")


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_call_reaches_the_servicer_as_cancellation(
    server: EchoServer, channel: grpc.aio.Channel, kind: str
) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(_request: bytes, _context: Context) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    server.act = hang
    task = asyncio.create_task(call(channel, kind))
    await asyncio.wait_for(entered.wait(), 5)
    task.cancel()

    await asyncio.wait_for(cancelled.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_pass_through_unchanged(channel: grpc.aio.Channel, kind: str) -> None:
    answers = await call(channel, kind, b"hello")

    assert answers == ([b"hello", b"hello"] if kind in ("Stream", "Duplex") else [b"hello"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [None, "w" * 40, TOKEN[:-1]])
async def test_caller_without_the_token_is_refused(
    server: EchoServer, token: str | None, kind: str
) -> None:
    async with open_channel(server.address, token) as channel:
        raised = await fail(channel, kind)

    assert raised.code() is grpc.StatusCode.UNAUTHENTICATED
    assert type(error_from_rpc(raised)) is UnavailableError


async def test_refused_call_never_reaches_the_servicer(server: EchoServer) -> None:
    seen: list[bytes] = []

    async def remember(request: bytes, _context: Context) -> bytes:
        seen.append(request)
        return request

    server.act = remember
    async with open_channel(server.address, None) as channel:
        await fail(channel, "Duplex")

    assert seen == []


async def test_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    absent: Any = channel.unary_unary("/chiasm.test.EchoService/Absent")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await absent(b"", timeout=5.0)

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
