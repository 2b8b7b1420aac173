"""Translate between the messages of ``encoder.proto`` and the encoder's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import chiasm
from chiasm.common.convert import (
    cache_status_to_proto,
    context_from_proto,
    data_type_to_proto,
    digest_from_proto,
    layout_to_proto,
    modality_from_proto,
    modality_to_proto,
    options_from_proto,
    ref_to_proto,
    tensor_spec_from_proto,
)
from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits, check_size
from chiasm.common.media import PatchGrid, TensorRole
from chiasm.encoder.commands import (
    BytesSource,
    Delivery,
    EncodeCommand,
    FramesSource,
    ItemChunk,
    ItemKey,
    ItemPlanned,
    TensorFileSource,
    TensorSource,
    UrlSource,
)
from chiasm.v1 import encoder_pb2, media_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.common.embedding_store import StoredEmbedding
    from chiasm.encoder.commands import (
        EncodeEvent,
        EncoderDescription,
        ItemEstimate,
        ItemReady,
        Source,
        StageTimings,
    )

SourceMessage: TypeAlias = "encoder_pb2.EncodeRequest | encoder_pb2.PlanRequest"

_LIMITS = Limits()


async def command_from_proto(messages: AsyncIterator[SourceMessage]) -> EncodeCommand:
    """Return the command that a request stream begins with; its source reads on from there.

    Raises:
        InvalidRequestError: The first message is no header, or a field of it is wrong.
    """
    first = await anext(messages, None)
    if first is None or first.WhichOneof("message") != "header":
        raise InvalidRequestError("The first message must be the header.", param="header")
    header = first.header
    return EncodeCommand(
        context=context_from_proto(header.context),
        modality=modality_from_proto(header.modality),
        uuid=header.uuid,
        options=options_from_proto(header.options),
        delivery=_delivery_from_proto(header.delivery),
        source=_source_from_proto(header, messages),
    )


def lookup_key_from_proto(
    message: encoder_pb2.LookupRequest | encoder_pb2.DeleteRequest,
) -> ItemKey:
    """Return what a lookup or delete names; raise ``InvalidRequestError`` if it names nothing."""
    kind = message.WhichOneof("key")
    if kind is None:
        raise InvalidRequestError("Either uuid or source_digest must be set.", param="key")
    digest = message.source_digest if kind == "source_digest" else None
    return ItemKey(
        context=context_from_proto(message.context),
        modality=modality_from_proto(message.modality),
        options=options_from_proto(message.options),
        uuid=message.uuid,
        source_digest=None if digest is None else digest_from_proto(digest, "source_digest"),
    )


def event_to_proto(event: EncodeEvent) -> encoder_pb2.EncodeResponse:
    """Return the message of an event."""
    if isinstance(event, ItemPlanned):
        return encoder_pb2.EncodeResponse(
            planned=encoder_pb2.Planned(
                ref=ref_to_proto(event.ref),
                layout=layout_to_proto(event.layout),
                cache_status=cache_status_to_proto(event.cache_status),
            )
        )
    if isinstance(event, ItemChunk):
        return encoder_pb2.EncodeResponse(
            chunk=media_pb2.EmbeddingChunk(
                embedding_id=event.embedding_id,
                tensor_index=event.tensor_index,
                offset=event.offset,
                data=bytes(event.data),
                is_last=event.is_last,
            )
        )
    return encoder_pb2.EncodeResponse(ready=_ready_to_proto(event))


def plan_to_proto(estimate: ItemEstimate) -> encoder_pb2.PlanResponse:
    """Return the answer to a plan."""
    return encoder_pb2.PlanResponse(
        layout=layout_to_proto(estimate.layout),
        num_tokens=estimate.layout.num_tokens,
        num_pixels=estimate.num_pixels,
        num_queue_pixels=estimate.num_queue_pixels,
    )


def stored_to_proto(stored: StoredEmbedding) -> encoder_pb2.LookupResponse:
    """Return the answer to a lookup."""
    return encoder_pb2.LookupResponse(
        ref=ref_to_proto(stored.ref), layout=layout_to_proto(stored.layout)
    )


def description_to_proto(
    description: EncoderDescription, num_encoded_items: int
) -> encoder_pb2.GetEncoderInfoResponse:
    """Return the encoder's description with its counter."""
    return encoder_pb2.GetEncoderInfoResponse(
        model=description.model,
        fingerprint=description.fingerprint,
        modalities=[modality_to_proto(modality) for modality in description.placeholders],
        max_source_bytes=description.max_source_bytes,
        max_pixels=description.max_pixels,
        hidden_size=description.hidden_size,
        dtype=data_type_to_proto(description.data_type),
        num_encoded_items=num_encoded_items,
        version=chiasm.__version__,
        placeholders=[
            encoder_pb2.Placeholder(
                modality=modality_to_proto(modality),
                token_id=placeholder.token_id,
                margin=placeholder.margin,
            )
            for modality, placeholder in description.placeholders.items()
        ],
    )


def _delivery_from_proto(value: encoder_pb2.Delivery.ValueType) -> Delivery:
    if value == encoder_pb2.DELIVERY_INLINE:
        return Delivery.INLINE
    if value in (encoder_pb2.DELIVERY_UNSPECIFIED, encoder_pb2.DELIVERY_STORE):
        return Delivery.STORE
    raise InvalidRequestError(f"Unknown delivery {value}.", param="delivery")


def _source_from_proto(
    header: encoder_pb2.EncodeHeader, messages: AsyncIterator[SourceMessage]
) -> Source | None:
    kind = header.WhichOneof("source")
    if kind is None:
        return None
    if kind == "url":
        return UrlSource(header.url)
    if kind == "bytes":
        return BytesSource(header.bytes.num_bytes, _chunks(messages))
    if kind == "tensor":
        spec = tensor_spec_from_proto(header.tensor.spec)
        if spec.role is not TensorRole.SPLICE:
            raise InvalidRequestError("A ready-made embedding must be spliced.", param="role")
        return TensorSource(spec.dtype, spec.shape, _grid(header.tensor), _chunks(messages))
    if kind == "tensor_file":
        file = header.tensor_file
        return TensorFileSource(file.num_bytes, file.num_grid_bytes, _grid(file), _chunks(messages))
    if header.modality != media_pb2.MODALITY_VIDEO:
        raise InvalidRequestError("Only a video is a list of frames.", param="frames")
    return FramesSource(_frames(header.frames), _chunks(messages))


def _frames(message: encoder_pb2.FramesSource) -> tuple[UrlSource | int, ...]:
    check_size(len(message.frames), _LIMITS.max_listed_frames, "frames of a video", "frames")
    if not message.frames:
        raise InvalidRequestError("The video has no frames.", param="frames")
    if any(frame.WhichOneof("source") is None for frame in message.frames):
        raise InvalidRequestError("A frame is empty.", param="frames")
    return tuple(
        UrlSource(frame.url) if frame.WhichOneof("source") == "url" else frame.num_bytes
        for frame in message.frames
    )


def _grid(
    message: encoder_pb2.TensorSource | encoder_pb2.TensorFileSource,
) -> PatchGrid | None:
    if not message.HasField("grid"):
        return None
    grid = message.grid
    if min(grid.t, grid.h, grid.w) < 1:
        raise InvalidRequestError("The sides of a grid must be at least 1.", param="grid")
    return PatchGrid(grid.t, grid.h, grid.w)


async def _chunks(messages: AsyncIterator[SourceMessage]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.WhichOneof("message") != "chunk":
            raise InvalidRequestError("Only chunks may follow the header.", param="header")
        chunk = message.chunk
        check_size(len(chunk), _LIMITS.max_chunk_bytes, "bytes of a chunk", "chunk")
        yield chunk


def _ready_to_proto(event: ItemReady) -> encoder_pb2.Ready:
    return encoder_pb2.Ready(
        cache_status=cache_status_to_proto(event.cache_status),
        num_bytes=event.num_bytes,
        timings=_timings_to_proto(event.timings),
    )


def _timings_to_proto(timings: StageTimings) -> encoder_pb2.StageTimings:
    return encoder_pb2.StageTimings(
        fetch_s=timings.fetch_s,
        decode_s=timings.decode_s,
        preprocess_s=timings.preprocess_s,
        encode_s=timings.encode_s,
        store_s=timings.store_s,
    )
