"""Call encoders: one streamed call per media item, and their description."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from chiasm.common.convert import (
    cache_status_from_proto,
    context_to_proto,
    digest_from_proto,
    layout_from_proto,
    modality_from_proto,
    modality_to_proto,
    options_to_proto,
    ref_from_proto,
)
from chiasm.common.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StoreUnavailableError,
    UnavailableError,
)
from chiasm.common.grpc_client import error_from_rpc
from chiasm.common.grpc_stream import finish_sending, send
from chiasm.common.media import Placeholder
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc

from .convert_source import announce
from .deadline import wait_for_peer
from .media_sources import contents_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

    from chiasm.common.errors import ChiasmError
    from chiasm.common.grpc_client import EndpointPool
    from chiasm.common.media import (
        CacheStatus,
        EmbeddingRef,
        MediaLayout,
        Modality,
        RequestContext,
    )
    from chiasm.v1 import media_pb2
    from chiasm.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

    from .budgets import RetryBudget
    from .chat_request import MediaItem
    from .deadline import Deadline

    PlanRpc = grpc.aio.StreamUnaryCall[encoder_pb2.PlanRequest, encoder_pb2.PlanResponse]
    EncodeRpc = grpc.aio.StreamStreamCall[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse]

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What the encoders are; see ``GetEncoderInfoResponse``."""

    fingerprint: bytes
    placeholders: Mapping[Modality, Placeholder]

    @property
    def modalities(self) -> frozenset[Modality]:
        """Modalities that the model takes."""
        return frozenset(self.placeholders)


@dataclass(frozen=True, slots=True)
class ItemPlanned:
    """The layout and identity of an item are known."""

    ref: EmbeddingRef
    layout: MediaLayout
    cache_status: CacheStatus


@dataclass(frozen=True, slots=True)
class ItemChunk:
    """A piece of the embedding, passed on as it came."""

    chunk: media_pb2.EmbeddingChunk


@dataclass(frozen=True, slots=True)
class ItemReady:
    """The embedding is in the store, or all its chunks came.

    Attributes:
        cache_status: How it came to be there.
        fetch_s: Seconds that fetching took; 0 if nothing was fetched.
        decode_s: Seconds that decoding took; 0 if nothing was decoded.
        encode_s: Seconds of preprocessing and tower, their waits included; 0 if they did not run.
    """

    cache_status: CacheStatus
    fetch_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """What an item would become; see ``PlanResponse``."""

    num_tokens: int
    num_pixels: int
    num_queue_pixels: int


EncodeEvent = ItemPlanned | ItemChunk | ItemReady


class EncoderClient:
    """Client of a pool of encoders that are all alike."""

    def __init__(self, pool: EndpointPool, retries: RetryBudget) -> None:
        self._pool = pool
        self._retries = retries

    @property
    def is_serving(self) -> bool:
        """Whether at least one encoder serves."""
        return self._pool.is_serving

    async def get_info(self, timeout_s: float) -> EncoderInfo:
        """Ask an encoder for its description.

        Raises:
            ChiasmError: No encoder answers.
        """
        try:
            async with self._pool.acquire() as channel:
                stub: EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(channel)
                info = await stub.GetEncoderInfo(
                    encoder_pb2.GetEncoderInfoRequest(), timeout=timeout_s
                )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        return EncoderInfo(
            fingerprint=digest_from_proto(info.fingerprint, "fingerprint"),
            placeholders={
                modality_from_proto(one.modality): Placeholder(one.token_id, one.margin)
                for one in info.placeholders
            },
        )

    async def encode(
        self, item: MediaItem, context: RequestContext, deadline: Deadline, *, inline: bool
    ) -> AsyncGenerator[EncodeEvent, None]:
        """Have one item encoded.

        The call is repeated on another encoder if the first cannot be reached or dies; once a
        chunk has come it is not, since chunks are passed on at once. Closing the generator cancels
        the call.

        Args:
            item: The item; its source is sent in chunks.
            context: Caller and request.
            deadline: Bound on the whole call.
            inline: Send the embedding back instead of storing it.

        Yields:
            ``ItemPlanned`` first, ``ItemReady`` last, ``ItemChunk`` between if it travels inline.

        Raises:
            ChiasmError: What the encoder answered, or ``UnavailableError`` if it broke off or
                another one planned the item otherwise.
        """
        self._retries.record_call()
        planned: ItemPlanned | None = None
        has_chunk = False
        while True:
            try:
                async with contextlib.aclosing(
                    self._encode_once(item, context, deadline, inline=inline)
                ) as events:
                    async for event in events:
                        if isinstance(event, ItemPlanned) and planned is not None:
                            _check_same(planned, event, item)
                            continue
                        planned = event if isinstance(event, ItemPlanned) else planned
                        has_chunk = has_chunk or isinstance(event, ItemChunk)
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                if has_chunk or not self._may_repeat(error):
                    raise _located(error_from_rpc(error), item) from None
                await wait_for_peer(self._pool, deadline)

    async def plan(self, item: MediaItem, context: RequestContext, deadline: Deadline) -> ItemPlan:
        """Ask what one item would become; nothing is encoded or stored.

        Args:
            item: The item; its source is sent in chunks.
            context: Caller and request.
            deadline: Bound on the whole call.

        Raises:
            ChiasmError: What the encoder answered.
        """
        self._retries.record_call()
        while True:
            try:
                return await self._plan_once(item, context, deadline)
            except grpc.aio.AioRpcError as error:
                if not self._may_repeat(error):
                    raise _located(error_from_rpc(error), item) from None
                await wait_for_peer(self._pool, deadline)

    def _may_repeat(self, error: grpc.aio.AioRpcError) -> bool:
        is_down = error.code() is grpc.StatusCode.UNAVAILABLE
        can_help = not isinstance(error_from_rpc(error), StoreUnavailableError)
        return is_down and can_help and self._retries.take()

    async def _plan_once(
        self, item: MediaItem, context: RequestContext, deadline: Deadline
    ) -> ItemPlan:
        async with self._pool.acquire() as channel:
            stub: EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(channel)
            call = stub.Plan(timeout=deadline.remaining_s())
            feeder = asyncio.create_task(_feed_plan(call, item, context))
            try:
                response = await call
            finally:
                call.cancel()
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)
        return ItemPlan(response.num_tokens, response.num_pixels, response.num_queue_pixels)

    async def _encode_once(
        self, item: MediaItem, context: RequestContext, deadline: Deadline, *, inline: bool
    ) -> AsyncGenerator[EncodeEvent, None]:
        async with self._pool.acquire() as channel:
            stub: EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(channel)
            call = stub.Encode(timeout=deadline.remaining_s())
            feeder = asyncio.create_task(_feed(call, item, context, inline=inline))
            is_ready = False
            try:
                async for response in call:
                    event = _event_from_proto(response)
                    is_ready = isinstance(event, ItemReady)
                    yield event
            finally:
                call.cancel()
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)
            if not is_ready:
                raise UnavailableError("The encoder broke off.", param=item.param)


async def _feed(call: EncodeRpc, item: MediaItem, context: RequestContext, *, inline: bool) -> None:
    """Send the header and the source; stop early if the encoder has ended the call."""
    delivery = encoder_pb2.DELIVERY_INLINE if inline else encoder_pb2.DELIVERY_STORE
    header = _header(item, context, delivery)
    is_open = await send(call, encoder_pb2.EncodeRequest(header=header))
    for chunk in _chunks(item):
        if not is_open:
            return
        is_open = await send(call, encoder_pb2.EncodeRequest(chunk=chunk))
    await finish_sending(call)


async def _feed_plan(call: PlanRpc, item: MediaItem, context: RequestContext) -> None:
    """As ``_feed``, for a plan."""
    header = _header(item, context, encoder_pb2.DELIVERY_STORE)
    is_open = await send(call, encoder_pb2.PlanRequest(header=header))
    for chunk in _chunks(item):
        if not is_open:
            return
        is_open = await send(call, encoder_pb2.PlanRequest(chunk=chunk))
    await finish_sending(call)


def _header(
    item: MediaItem, context: RequestContext, delivery: encoder_pb2.Delivery.ValueType
) -> encoder_pb2.EncodeHeader:
    header = encoder_pb2.EncodeHeader(
        context=context_to_proto(context),
        modality=modality_to_proto(item.modality),
        uuid=item.uuid,
        options=options_to_proto(item.options),
        delivery=delivery,
    )
    announce(item.source, header)
    return header


def _chunks(item: MediaItem) -> Iterator[bytes]:
    for content in contents_of(item.source):
        data = content.data or b""
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _event_from_proto(response: encoder_pb2.EncodeResponse) -> EncodeEvent:
    kind = response.WhichOneof("message")
    if kind == "planned":
        planned = response.planned
        return ItemPlanned(
            ref=ref_from_proto(planned.ref),
            layout=layout_from_proto(planned.layout),
            cache_status=cache_status_from_proto(planned.cache_status),
        )
    if kind == "ready":
        return _ready_from_proto(response.ready)
    return ItemChunk(response.chunk)


def _ready_from_proto(ready: encoder_pb2.Ready) -> ItemReady:
    timings = ready.timings
    return ItemReady(
        cache_status=cache_status_from_proto(ready.cache_status),
        fetch_s=timings.fetch_s,
        decode_s=timings.decode_s,
        encode_s=timings.preprocess_s + timings.encode_s,
    )


def _check_same(first: ItemPlanned, second: ItemPlanned, item: MediaItem) -> None:
    """Refuse a second plan that differs: the generator may have been told the first."""
    if (first.ref, first.layout) != (second.ref, second.layout):
        raise UnavailableError("The encoders disagree about the item.", param=item.param)


def _located(error: ChiasmError, item: MediaItem) -> ChiasmError:
    """Return ``error`` with the part's path as param, so that the client sees which item it was."""
    if not isinstance(error, InvalidRequestError | NotFoundError | ConflictError):
        return error
    return type(error)(
        _indexed(error.message, item),
        reason=error.reason,
        param=item.param,
        retry_after_s=error.retry_after_s,
    )


def _indexed(message: str, item: MediaItem) -> str:
    """Put the item's true index into a message; the encoder sees one item and calls it 0."""
    kind = item.modality.value
    return message.replace(f"{kind} at index 0 ", f"{kind} at index {item.index} ")
