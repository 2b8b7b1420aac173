"""Write down for the encoder where an item comes from; its bytes follow in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.convert import data_type_to_proto
from chiasm.v1 import encoder_pb2, media_pb2

from .chat_request import BytesSource, UrlSource
from .media_sources import FramesSource, TensorFileSource, TensorSource

if TYPE_CHECKING:
    from chiasm.common.media import PatchGrid

    from .media_sources import MediaSource


def announce(source: MediaSource | None, header: encoder_pb2.EncodeHeader) -> None:
    """Set the source of ``header``; ``contents_of`` tells which bytes have to follow it."""
    match source:
        case UrlSource():
            header.url = source.url
        case BytesSource():
            header.bytes.num_bytes = _size(source)
        case FramesSource():
            header.frames.frames.extend(map(_frame, source.frames))
        case TensorSource():
            header.tensor.CopyFrom(_tensor(source))
        case TensorFileSource():
            header.tensor_file.CopyFrom(
                encoder_pb2.TensorFileSource(
                    num_bytes=_size(source.file),
                    num_grid_bytes=_size(source.grid_file) if source.grid_file else 0,
                    grid=_grid(source.grid),
                )
            )
        case None:
            pass


def _frame(frame: UrlSource | BytesSource) -> encoder_pb2.FrameSource:
    if isinstance(frame, UrlSource):
        return encoder_pb2.FrameSource(url=frame.url)
    return encoder_pb2.FrameSource(num_bytes=_size(frame))


def _tensor(source: TensorSource) -> encoder_pb2.TensorSource:
    return encoder_pb2.TensorSource(
        spec=media_pb2.TensorSpec(
            role=media_pb2.TENSOR_ROLE_SPLICE,
            dtype=data_type_to_proto(source.dtype),
            shape=source.shape,
        ),
        grid=_grid(source.grid),
    )


def _grid(grid: PatchGrid | None) -> media_pb2.PatchGrid | None:
    return None if grid is None else media_pb2.PatchGrid(t=grid.t, h=grid.h, w=grid.w)


def _size(content: BytesSource) -> int:
    return len(content.data or b"")
