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
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc

from .convert_source import announce
from .deadline import wait_for_peer
from .media_sources import contents_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

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

    EncodeRpc = grpc.aio.StreamStreamCall[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse]

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What the encoders are; see ``GetEncoderInfoResponse``."""

    fingerprint: bytes
    placeholder_ids: Mapping[Modality, int]

    @property
    def modalities(self) -> frozenset[Modality]:
        """Modalities that the model takes."""
        return frozenset(self.placeholder_ids)


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
    """The embedding is in the store, or all its chunks came."""

    cache_status: CacheStatus


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
            placeholder_ids={
                modality_from_proto(placeholder.modality): placeholder.token_id
                for placeholder in info.placeholders
            },
        )

    async def encode(
        self, item: MediaItem, context: RequestContext, deadline: Deadline, *, inline: bool
    ) -> AsyncGenerator[EncodeEvent, None]:
        """Have one item encoded.

        The call is repeated on another encoder if the first cannot be reached; once an event has
        come it is not. Closing the generator cancels the call.

        Args:
            item: The item; its source is sent in chunks.
            context: Caller and request.
            deadline: Bound on the whole call.
            inline: Send the embedding back instead of storing it.

        Yields:
            ``ItemPlanned`` first, ``ItemReady`` last, ``ItemChunk`` between if it travels inline.

        Raises:
            ChiasmError: What the encoder answered, or ``UnavailableError`` if it broke off.
        """
        self._retries.record_call()
        while True:
            has_event = False
            try:
                async with contextlib.aclosing(
                    self._encode_once(item, context, deadline, inline=inline)
                ) as events:
                    async for event in events:
                        has_event = True
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error)
                is_down = error.code() is grpc.StatusCode.UNAVAILABLE
                can_help = not isinstance(failure, StoreUnavailableError)
                if has_event or not is_down or not can_help or not self._retries.take():
                    raise _located(failure, item) from None
                await wait_for_peer(self._pool, deadline)

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
    header = encoder_pb2.EncodeHeader(
        context=context_to_proto(context),
        modality=modality_to_proto(item.modality),
        uuid=item.uuid,
        options=options_to_proto(item.options),
        delivery=encoder_pb2.DELIVERY_INLINE if inline else encoder_pb2.DELIVERY_STORE,
    )
    contents = [content.data or b"" for content in contents_of(item.source)]
    announce(item.source, header)
    is_open = await send(call, encoder_pb2.EncodeRequest(header=header))
    for data in contents:
        for start in range(0, len(data), CHUNK_BYTES):
            if not is_open:
                return
            chunk = encoder_pb2.EncodeRequest(chunk=data[start : start + CHUNK_BYTES])
            is_open = await send(call, chunk)
    await finish_sending(call)


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
        return ItemReady(cache_status_from_proto(response.ready.cache_status))
    return ItemChunk(response.chunk)


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
