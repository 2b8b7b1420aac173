"""Call generators: requests over the session of each, and their description."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc

from chiasm.common.convert import context_to_proto, span_to_proto
from chiasm.common.grpc_client import error_from_rpc
from chiasm.common.sampling import wishes_to_proto
from chiasm.v1 import generator_pb2, generator_pb2_grpc, media_pb2

from .chat_events import TokenLogprobs
from .deadline import wait_for_peer
from .session_call import CallEndedError
from .session_pool import SessionPool

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from chiasm.common.errors import ChiasmError
    from chiasm.common.grpc_client import EndpointPool
    from chiasm.common.media import MediaSpan, RequestContext
    from chiasm.common.sampling import SamplingWishes
    from chiasm.v1.generator_pb2_grpc import GeneratorServiceAsyncStub

    from .budgets import RetryBudget
    from .deadline import Deadline
    from .session_call import SessionCall

_MAX_CHUNK_BYTES = 1 << 20


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
    """Tokens that were added to answer ``index``, with how likely they were if that was asked.

    ``num_cached_tokens`` are prompt tokens whose KV came from the prefix cache.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptScored:
    """How likely consecutive tokens of the prompt were, the first of which is at ``start``."""

    start: int
    logprobs: tuple[TokenLogprobs, ...]


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
        index: Which of the answers ended.
    """

    finish_reason: str
    stop_token_id: int | None
    index: int = 0


GenerateEvent = TokensAdded | PromptScored | EmbeddingNeeded | SequenceFinished

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
        self._sessions = SessionPool()

    async def start(self) -> None:
        """Find the generators; sessions are opened at their first request."""
        await self._pool.start()

    async def close(self) -> None:
        """End all sessions and close every channel."""
        await self._sessions.close()
        await self._pool.close()

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
        peers = GeneratorPeers(self._pool, self._sessions, self._retries)
        return GenerateCall(peers, start, deadline)


@dataclass(frozen=True, slots=True)
class GeneratorPeers:
    """The generators as a call needs them: endpoints, their sessions, how often it may repeat."""

    pool: EndpointPool
    sessions: SessionPool
    retries: RetryBudget


class GenerateCall:
    """One request to a generator: an async context manager that is iterated for events.

    Embeddings are reported by ``send_ready``, ``send_chunk`` and ``send_failed`` from other tasks
    while the call is iterated. Leaving the context cancels the request and so frees its blocks.

    A request that could not reach its generator is repeated on another one, as long as no message
    has come and no chunk was sent.
    """

    def __init__(self, peers: GeneratorPeers, start: GenerateStart, deadline: Deadline) -> None:
        self._peers = peers
        self._start = start
        self._deadline = deadline
        self._lease: AbstractAsyncContextManager[grpc.aio.Channel] | None = None
        self._call: SessionCall | None = None
        self._ready_ids = {span.ref.embedding_id for span in start.spans if span.is_ready}
        self._failure: ChiasmError | None = None
        self._can_repeat = True
        self._is_half_closed = not start.spans

    async def __aenter__(self) -> Self:
        self._peers.retries.record_call()
        try:
            try:
                await self._open()
            except CallEndedError as ended:
                await self._repeat_or_raise(ended)
        except BaseException as error:
            await self._close(error)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        # An encoder that failed says nothing about the generator.
        await self._close(None if error is self._failure else error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerateEvent:
        """Return the next event.

        Raises:
            StopAsyncIteration: The call ended after the last ``SequenceFinished``.
            ChiasmError: What the generator answered, or what ``send_failed`` reported.
        """
        while True:
            assert self._call is not None, "the call has been entered"
            try:
                response = await self._call.read()
            except CallEndedError as ended:
                await self._repeat_or_raise(ended)
                continue
            if response is None:
                raise StopAsyncIteration
            self._can_repeat = False
            event = _event_from_proto(response, self._start.token_ids)
            if event is not None:
                return event

    async def send_ready(self, embedding_id: bytes) -> None:
        """Report that an embedding is in the store now."""
        self._ready_ids.add(embedding_id)
        ready = generator_pb2.EmbeddingReady(embedding_id=embedding_id)
        await self._send(generator_pb2.GenerateRequest(ready=ready))

    async def send_chunk(self, chunk: media_pb2.EmbeddingChunk) -> None:
        """Pass on a piece of an embedding, in messages of at most 1 MiB."""
        self._can_repeat = False
        for piece in _pieces(chunk):
            await self._send(generator_pb2.GenerateRequest(chunk=piece))

    async def send_failed(self, embedding_id: bytes, error: ChiasmError) -> None:
        """Report that an embedding cannot be had; the iteration ends with ``error``."""
        self._failure = self._failure or error
        failed = generator_pb2.EmbeddingFailed(
            embedding_id=embedding_id, reason=error.reason, message=error.message
        )
        await self._send(generator_pb2.GenerateRequest(failed=failed))

    def stop_answer(self, index: int) -> None:
        """Say that no more of one answer is wanted; the others go on."""
        if self._call is not None:
            self._call.stop_answer(index)

    def finish_sending(self) -> None:
        """Say that no embedding will be reported any more."""
        if not self._is_half_closed:
            self._is_half_closed = True
            if self._call is not None:
                self._call.half_close()

    async def _open(self) -> None:
        lease = self._peers.pool.acquire()
        channel = await lease.__aenter__()
        self._lease = lease
        self._call = self._peers.sessions.get(channel).start(
            _start_to_proto(self._start, self._ready_ids),
            self._deadline.remaining_s(),
            is_half_closed=self._is_half_closed,
        )

    async def _close(self, error: BaseException | None) -> None:
        call, self._call = self._call, None
        lease, self._lease = self._lease, None
        if call is not None:
            call.close()
        if lease is not None:
            kind, traceback = (type(error), error.__traceback__) if error else (None, None)
            await lease.__aexit__(kind, error, traceback)

    async def _send(self, update: generator_pb2.GenerateRequest) -> None:
        if self._call is not None:
            await self._call.send(update)

    async def _repeat_or_raise(self, ended: CallEndedError) -> None:
        is_open = False
        while not is_open:
            if self._failure is not None:
                raise self._failure from None
            if not ended.is_away or not self._can_repeat or not self._peers.retries.take():
                raise ended.error from None
            # The pool passes over an endpoint that is handed back with this error.
            await self._close(ended.error)
            await wait_for_peer(self._peers.pool, self._deadline)
            try:
                await self._open()
                is_open = True
            except CallEndedError as again:
                ended = again


def _pieces(chunk: media_pb2.EmbeddingChunk) -> list[media_pb2.EmbeddingChunk]:
    data = chunk.data
    if len(data) <= _MAX_CHUNK_BYTES:
        return [chunk]
    return [
        media_pb2.EmbeddingChunk(
            embedding_id=chunk.embedding_id,
            tensor_index=chunk.tensor_index,
            offset=chunk.offset + start,
            data=data[start : start + _MAX_CHUNK_BYTES],
            is_last=chunk.is_last and start + _MAX_CHUNK_BYTES >= len(data),
        )
        for start in range(0, len(data), _MAX_CHUNK_BYTES)
    ]


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


def _event_from_proto(
    response: generator_pb2.GenerateResponse, prompt: Sequence[int]
) -> GenerateEvent | None:
    kind = response.WhichOneof("message")
    if kind == "delta":
        delta = response.delta
        logprobs = _logprobs_from_proto(delta.token_ids, delta.logprobs)
        return TokensAdded(tuple(delta.token_ids), logprobs, delta.index, delta.num_cached_tokens)
    if kind == "prompt":
        start = response.prompt.start
        scored = response.prompt.logprobs
        token_ids = prompt[start : start + len(scored)]
        return PromptScored(start, _logprobs_from_proto(token_ids, scored))
    if kind == "need":
        return EmbeddingNeeded(response.need.embedding_id)
    if kind == "finished":
        finished = response.finished
        return SequenceFinished(
            finish_reason=_FINISH_REASONS.get(finished.finish_reason, "stop"),
            stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
            index=finished.index,
        )
    return None


def _logprobs_from_proto(
    token_ids: Sequence[int], logprobs: Sequence[generator_pb2.TokenLogprobs]
) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id, one.logprob, one.rank, tuple(one.top_token_ids), tuple(one.top_logprobs)
        )
        for token_id, one in zip(token_ids, logprobs, strict=False)
    )
