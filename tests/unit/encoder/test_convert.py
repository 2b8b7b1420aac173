"""Messages become commands, and events messages; what is malformed names its field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import CacheStatus, Modality
from chiasm.encoder.commands import BytesSource, Delivery, ItemChunk, ItemReady, StageTimings
from chiasm.encoder.convert import command_from_proto, event_to_proto, lookup_key_from_proto
from chiasm.v1 import encoder_pb2, media_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONTEXT = media_pb2.RequestContext(request_id="r", attempt_id="a", tenant="t")


def make_header(**fields: object) -> encoder_pb2.EncodeHeader:
    known = {"context": CONTEXT, "modality": media_pb2.MODALITY_IMAGE, **fields}
    return encoder_pb2.EncodeHeader(**known)  # type: ignore[arg-type]  # checked by upb


async def stream(*messages: encoder_pb2.EncodeRequest) -> AsyncIterator[encoder_pb2.EncodeRequest]:
    for message in messages:
        yield message


async def test_a_header_becomes_a_command() -> None:
    header = make_header(
        uuid="u",
        delivery=encoder_pb2.DELIVERY_INLINE,
        options=media_pb2.ProcessingOptions(max_pixels=7),
        bytes=encoder_pb2.BytesSource(num_bytes=4),
    )
    messages = stream(
        encoder_pb2.EncodeRequest(header=header),
        encoder_pb2.EncodeRequest(chunk=b"ab"),
        encoder_pb2.EncodeRequest(chunk=b"cd"),
    )

    command = await command_from_proto(messages)

    assert (command.uuid, command.modality) == ("u", Modality.IMAGE)
    assert command.delivery is Delivery.INLINE
    assert command.options.max_pixels == 7
    assert isinstance(command.source, BytesSource)
    assert command.source.num_bytes == 4
    assert [chunk async for chunk in command.source.chunks] == [b"ab", b"cd"]


async def test_an_absent_source_is_null_media_and_delivery_goes_to_the_store() -> None:
    command = await command_from_proto(stream(encoder_pb2.EncodeRequest(header=make_header())))

    assert command.source is None
    assert command.delivery is Delivery.STORE


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "header"),
        ([encoder_pb2.EncodeRequest(chunk=b"x")], "header"),
        ([encoder_pb2.EncodeRequest()], "header"),
        ([encoder_pb2.EncodeRequest(header=make_header(modality=0))], "modality"),
        ([encoder_pb2.EncodeRequest(header=make_header(delivery=9))], "delivery"),
        (
            [encoder_pb2.EncodeRequest(header=make_header(tensor=encoder_pb2.TensorSource()))],
            "role",
        ),
        (
            [
                encoder_pb2.EncodeRequest(
                    header=make_header(
                        tensor=encoder_pb2.TensorSource(
                            spec=media_pb2.TensorSpec(
                                role=media_pb2.TENSOR_ROLE_DEEPSTACK,
                                dtype=media_pb2.DATA_TYPE_FLOAT32,
                                shape=[1, 1],
                            )
                        )
                    )
                )
            ],
            "role",
        ),
        (
            [
                encoder_pb2.EncodeRequest(
                    header=make_header(
                        tensor_file=encoder_pb2.TensorFileSource(
                            num_bytes=1, grid=media_pb2.PatchGrid(t=1)
                        )
                    )
                )
            ],
            "grid",
        ),
        (
            [
                encoder_pb2.EncodeRequest(
                    header=make_header(
                        modality=media_pb2.MODALITY_VIDEO,
                        frames=encoder_pb2.FramesSource(
                            frames=[encoder_pb2.FrameSource(num_bytes=1)] * 257
                        ),
                    )
                )
            ],
            "frames",
        ),
        (
            [
                encoder_pb2.EncodeRequest(
                    header=make_header(
                        modality=media_pb2.MODALITY_VIDEO,
                        frames=encoder_pb2.FramesSource(frames=[encoder_pb2.FrameSource()]),
                    )
                )
            ],
            "frames",
        ),
        (
            [encoder_pb2.EncodeRequest(header=make_header(context=media_pb2.RequestContext()))],
            "context.request_id",
        ),
    ],
)
async def test_malformed_headers_name_the_field(
    messages: list[encoder_pb2.EncodeRequest], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await command_from_proto(stream(*messages))
    assert caught.value.param == param


@pytest.mark.parametrize(("size", "fits"), [(1 << 20, True), ((1 << 20) + 1, False)])
async def test_chunks_are_bounded(size: int, fits: bool) -> None:
    header = make_header(bytes=encoder_pb2.BytesSource(num_bytes=size))
    chunk = encoder_pb2.EncodeRequest(chunk=b"x" * size)
    command = await command_from_proto(stream(encoder_pb2.EncodeRequest(header=header), chunk))
    assert isinstance(command.source, BytesSource)

    if fits:
        assert len(await anext(command.source.chunks)) == size
        return
    with pytest.raises(TooLargeError):
        await anext(command.source.chunks)


async def test_a_second_header_is_refused() -> None:
    header = encoder_pb2.EncodeRequest(
        header=make_header(bytes=encoder_pb2.BytesSource(num_bytes=1))
    )
    command = await command_from_proto(stream(header, header))
    assert isinstance(command.source, BytesSource)

    with pytest.raises(InvalidRequestError, match="Only chunks may follow"):
        await anext(command.source.chunks)


def test_events_become_messages() -> None:
    chunk = ItemChunk(b"\1" * 32, 0, 5, memoryview(b"abc"), is_last=True)
    ready = ItemReady(CacheStatus.INLINE, 3, StageTimings(decode_s=0.5))

    chunk_message = event_to_proto(chunk).chunk
    ready_message = event_to_proto(ready).ready

    assert (chunk_message.offset, chunk_message.data, chunk_message.is_last) == (5, b"abc", True)
    assert ready_message.cache_status == media_pb2.CACHE_STATUS_INLINE
    assert ready_message.timings.decode_s == 0.5


def test_lookups_must_name_something() -> None:
    fields = {"context": CONTEXT, "modality": media_pb2.MODALITY_IMAGE}
    nothing = encoder_pb2.LookupRequest(**fields)  # type: ignore[arg-type]  # checked by upb
    short = encoder_pb2.DeleteRequest(**fields, source_digest=b"x")  # type: ignore[arg-type]

    with pytest.raises(InvalidRequestError, match="Either uuid or source_digest"):
        lookup_key_from_proto(nothing)
    with pytest.raises(InvalidRequestError, match="source_digest must have 32 bytes"):
        lookup_key_from_proto(short)
