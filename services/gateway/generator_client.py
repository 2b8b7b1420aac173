"""Call generators: one bidirectional stream per request, and their description."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc

from chiasm.common.convert import context_to_proto, span_to_proto
from chiasm.common.grpc_client import error_from_rpc
from chiasm.common.grpc_stream import finish_sending, send
from chiasm.common.sampling import wishes_to_proto
from chiasm.v1 import generator_pb2, generator_pb2_grpc

from .chat_events import TokenLogprobs
from .deadline import wait_for_peer

if TYPE_CHECKING:
    import types
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from chiasm.common.errors import ChiasmError
    from chiasm.common.grpc_client import EndpointPool
    from chiasm.common.media import MediaSpan, RequestContext
    from chiasm.common.sampling import SamplingWishes
    from chiasm.v1 import media_pb2
    from chiasm.v1.generator_pb2_grpc import GeneratorServiceAsyncStub

    from .budgets import RetryBudget
    from .deadline import Deadline

    GenerateRpc = grpc.aio.StreamStreamCall[
        generator_pb2.GenerateRequest, generator_pb2.GenerateResponse
    ]


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """What the generators are; see ``GetGeneratorInfoResponse``."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class GenerateStart:
    """The prompt and how to go on from it."""

    context: RequestContext
    token_ids: list[int]
    spans: tuple[MediaSpan, ...]
    sampling: SamplingWishes


@dataclass(frozen=True, slots=True)
class TokensAdded:
    """Tokens that one engine step added, and how likely they were if that was asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbeddingNeeded:
    """An embedding is not, or no longer, in the store."""

    embedding_id: bytes


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """The sequence ended.

    Attributes:
        finish_reason: ``stop``, ``length`` or ``cancelled``.
        stop_token_id: The token that ended it, if one did.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
    """

    finish_reason: str
    stop_token_id: int | None
    num_cached_tokens: int


GenerateEvent = TokensAdded | EmbeddingNeeded | SequenceFinished

_FINISH_REASONS = {
    generator_pb2.FINISH_REASON_STOP: "stop",
    generator_pb2.FINISH_REASON_LENGTH: "length",
    generator_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


class GeneratorClient:
    """Client of a pool of generators that are all alike."""

    def __init__(self, pool: EndpointPool, retries: RetryBudget) -> None:
        self._pool = pool
        self._retries = retries

    @property
    def is_serving(self) -> bool:
        """Whether at least one generator serves."""
        return self._pool.is_serving

    async def get_info(self, timeout_s: float) -> GeneratorInfo:
        """Ask a generator for its description.

        Raises:
            ChiasmError: No generator answers.
        """
        try:
            async with self._pool.acquire() as channel:
                stub: GeneratorServiceAsyncStub = generator_pb2_grpc.GeneratorServiceStub(channel)
                info = await stub.GetGeneratorInfo(
                    generator_pb2.GetGeneratorInfoRequest(), timeout=timeout_s
                )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        return GeneratorInfo(
            model=info.model,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=frozenset(info.eos_token_ids),
        )

    def generate(self, start: GenerateStart, deadline: Deadline) -> GenerateCall:
        """Return a call for one prompt; enter it to send the prompt."""
        return GenerateCall(self._pool, self._retries, start, deadline)


class GenerateCall:
    """One ``Generate`` call: an async context manager that is iterated for events.

    Embeddings are reported by ``send_ready``, ``send_chunk`` and ``send_failed`` from other tasks
    while the call is iterated. Leaving the context cancels the call and so frees its blocks.

    A call that could not reach its generator is repeated on another one, as long as no message has
    come and no chunk was sent.
    """

    def __init__(
        self,
        pool: EndpointPool,
        retries: RetryBudget,
        start: GenerateStart,
        deadline: Deadline,
    ) -> None:
        self._pool = pool
        self._retries = retries
        self._start = start
        self._deadline = deadline
        self._lease: AbstractAsyncContextManager[grpc.aio.Channel] | None = None
        self._rpc: GenerateRpc | None = None
        self._writing = asyncio.Lock()
        self._ready_ids = {span.ref.embedding_id for span in start.spans if span.is_ready}
        self._failure: ChiasmError | None = None
        self._can_repeat = True
        self._is_half_closed = not start.spans

    async def __aenter__(self) -> Self:
        self._retries.record_call()
        try:
            await self._open()
        except BaseException as error:  # left while it sends: a caller may have been cancelled
            await self._close(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if error is not None and error is self._failure:
            # An encoder failed; its error says nothing about the generator.
            kind = error = traceback = None
        await self._close(kind, error, traceback)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerateEvent:
        """Return the next event.

        Raises:
            StopAsyncIteration: The call ended after ``SequenceFinished``.
            ChiasmError: What the generator answered, or what ``send_failed`` reported.
        """
        while True:
            assert self._rpc is not None, "the call has been entered"
            try:
                response = await self._rpc.read()
            except grpc.aio.AioRpcError as error:
                await self._repeat_or_raise(error)
                continue
            if not isinstance(response, generator_pb2.GenerateResponse):
                raise StopAsyncIteration
            self._can_repeat = False
            event = _event_from_proto(response)
            if event is not None:
                return event

    async def send_ready(self, embedding_id: bytes) -> None:
        """Report that an embedding is in the store now."""
        self._ready_ids.add(embedding_id)
        ready = generator_pb2.EmbeddingReady(embedding_id=embedding_id)
        await self._write(generator_pb2.GenerateRequest(ready=ready))

    async def send_chunk(self, chunk: media_pb2.EmbeddingChunk) -> None:
        """Pass on a piece of an embedding."""
        self._can_repeat = False
        await self._write(generator_pb2.GenerateRequest(chunk=chunk))

    async def send_failed(self, embedding_id: bytes, error: ChiasmError) -> None:
        """Report that an embedding cannot be had; the iteration ends with ``error``."""
        self._failure = self._failure or error
        failed = generator_pb2.EmbeddingFailed(
            embedding_id=embedding_id, reason=error.reason, message=error.message
        )
        await self._write(generator_pb2.GenerateRequest(failed=failed))

    async def finish_sending(self) -> None:
        """Close the sending side: no embedding will be reported any more."""
        if not self._is_half_closed:
            self._is_half_closed = True
            async with self._writing:
                assert self._rpc is not None, "the call has been entered"
                await finish_sending(self._rpc)

    async def _open(self) -> None:
        lease = self._pool.acquire()
        channel = await lease.__aenter__()
        self._lease = lease
        stub: GeneratorServiceAsyncStub = generator_pb2_grpc.GeneratorServiceStub(channel)
        async with self._writing:
            self._rpc = stub.Generate(timeout=self._deadline.remaining_s())
            start = _start_to_proto(self._start, self._ready_ids)
            await send(self._rpc, generator_pb2.GenerateRequest(start=start))
            if self._is_half_closed:
                await finish_sending(self._rpc)

    async def _close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        lease, self._lease = self._lease, None
        if self._rpc is not None:
            self._rpc.cancel()
        if lease is not None:
            await lease.__aexit__(kind, error, traceback)

    async def _write(self, request: generator_pb2.GenerateRequest) -> None:
        async with self._writing:
            assert self._rpc is not None, "the call has been entered"
            await send(self._rpc, request)

    async def _repeat_or_raise(self, error: grpc.aio.AioRpcError) -> None:
        if self._failure is not None:
            raise self._failure from None
        is_down = error.code() is grpc.StatusCode.UNAVAILABLE
        if not is_down or not self._can_repeat or not self._retries.take():
            raise error_from_rpc(error) from None
        # The pool passes over an endpoint that is handed back with this error.
        await self._close(type(error), error, error.__traceback__)
        await wait_for_peer(self._pool, self._deadline)
        await self._open()


def _start_to_proto(start: GenerateStart, ready_ids: set[bytes]) -> generator_pb2.GenerateStart:
    spans = [
        replace(span, is_ready=span.is_ready or span.ref.embedding_id in ready_ids)
        for span in start.spans
    ]
    return generator_pb2.GenerateStart(
        context=context_to_proto(start.context),
        token_ids=start.token_ids,
        spans=[span_to_proto(span) for span in spans],
        sampling=wishes_to_proto(start.sampling),
    )


def _event_from_proto(response: generator_pb2.GenerateResponse) -> GenerateEvent | None:
    kind = response.WhichOneof("message")
    if kind == "delta":
        return TokensAdded(tuple(response.delta.token_ids), _logprobs_from_proto(response.delta))
    if kind == "need":
        return EmbeddingNeeded(response.need.embedding_id)
    if kind == "finished":
        finished = response.finished
        return SequenceFinished(
            finish_reason=_FINISH_REASONS.get(finished.finish_reason, "stop"),
            stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
            num_cached_tokens=finished.num_cached_tokens,
        )
    return None


def _logprobs_from_proto(delta: generator_pb2.TokenDelta) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id, one.logprob, one.rank, tuple(one.top_token_ids), tuple(one.top_logprobs)
        )
        for token_id, one in zip(delta.token_ids, delta.logprobs, strict=False)
    )
