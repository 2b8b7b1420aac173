"""Translate the media parts of ``chat.proto`` to domain types, checking every field on the way."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from chiasm.common.convert import data_type_from_proto, modality_from_proto, options_from_proto
from chiasm.common.data_url import decode_data_url, is_data_url
from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import validate_uuid
from chiasm.common.limits import check_size
from chiasm.common.media import Modality, PatchGrid, ProcessingOptions

from .chat_request import BytesSource, MediaItem, UrlSource
from .media_sources import FramesSource, TensorFileSource, TensorSource, num_bytes_of

if TYPE_CHECKING:
    from chiasm.common.limits import Limits
    from chiasm.v1 import chat_pb2, media_pb2

    from .media_policy import MediaPolicy
    from .media_sources import MediaSource

_MAX_RGB = 0xFFFFFF
_MAX_TENSOR_DIMENSIONS = 4


class MediaReader:
    """Reads the media parts of one request, counting the items as it goes."""

    def __init__(self, limits: Limits, policy: MediaPolicy) -> None:
        self._limits = limits
        self._policy = policy
        self._num_items: Counter[Modality] = Counter()

    def read(self, media: chat_pb2.MediaPart, param: str) -> MediaItem:
        """Return the checked item of a part; a data URL is decoded.

        Args:
            media: The part.
            param: Path of the part in the request.

        Raises:
            InvalidRequestError: A field is wrong; names it.
            TooLargeError: The item is over its limit.
        """
        modality = modality_from_proto(media.modality)
        index = self._num_items[modality]
        self._num_items[modality] += 1
        check_size(
            self._num_items.total(), self._limits.max_media_items, "media items in a request", param
        )
        if media.uuid:
            validate_uuid(media.uuid, f"{param}.uuid")
        source = self._source(media, modality, param)
        if source is None and not media.uuid:
            name = modality.value
            raise InvalidRequestError(
                f"multi_modal_data['{name}'][{index}] is empty but"
                f" multi_modal_uuids['{name}'][{index}] is missing.",
                param=param,
            )
        wishes = options_from_proto(media.options)
        _check_options(wishes, self._limits, param)
        return MediaItem(
            modality=modality,
            index=index,
            param=param,
            uuid=media.uuid,
            options=self._policy.merge(modality, wishes),
            source=source,
            is_plain=wishes == ProcessingOptions(),
        )

    def _source(
        self, media: chat_pb2.MediaPart, modality: Modality, param: str
    ) -> MediaSource | None:
        match media.WhichOneof("source"):
            case None:
                return None
            case "data":
                return self._file(media.data, param)
            case "url":
                return self._url(media.url, param)
            case "frames":
                return self._frames(media.frames, modality, param)
            case "tensor":
                self._check_embeddings_are_taken(modality, param)
                return self._tensor(media.tensor, param)
            case "tensor_file":
                self._check_embeddings_are_taken(modality, param)
                return self._tensor_file(media.tensor_file, param)

    def _file(self, data: bytes, param: str) -> BytesSource:
        check_size(len(data), self._limits.max_source_bytes, "bytes of media", param)
        if not data:
            raise InvalidRequestError("The media item has no bytes.", param=param)
        return BytesSource(data)

    def _url(self, url: str, param: str) -> UrlSource | BytesSource:
        max_bytes = self._limits.max_source_bytes
        if is_data_url(url):
            return BytesSource(decode_data_url(url, max_bytes=max_bytes, param=param))
        check_size(len(url), self._limits.max_url_chars, "characters of a URL", param)
        return UrlSource(url)

    def _frames(self, message: chat_pb2.FrameList, modality: Modality, param: str) -> FramesSource:
        if modality is not Modality.VIDEO:
            raise InvalidRequestError("Only a video is a list of frames.", param=param)
        check_size(len(message.frames), self._limits.max_listed_frames, "frames of a video", param)
        if not message.frames:
            raise InvalidRequestError("The video has no frames.", param=param)
        frames: list[UrlSource | BytesSource] = []
        num_bytes = 0
        for index, frame in enumerate(message.frames):
            path = f"{param}.frames[{index}]"
            kind = frame.WhichOneof("source")
            if kind is None:
                raise InvalidRequestError("The frame is empty.", param=path)
            source = self._url(frame.url, path) if kind == "url" else self._file(frame.data, path)
            num_bytes += num_bytes_of(source)
            check_size(num_bytes, self._limits.max_source_bytes, "bytes of media", param)
            frames.append(source)
        return FramesSource(tuple(frames))

    def _tensor(self, message: chat_pb2.MediaTensor, param: str) -> TensorSource:
        data = message.data
        check_size(len(data), self._limits.max_tensor_bytes, "bytes of a tensor", param)
        dtype = data_type_from_proto(message.dtype)
        shape = tuple(message.shape)
        if not 1 <= len(shape) <= _MAX_TENSOR_DIMENSIONS or min(shape) < 1:
            raise InvalidRequestError(
                f"A tensor must have 1 to {_MAX_TENSOR_DIMENSIONS} dimensions of at least 1.",
                param=f"{param}.shape",
            )
        if math.prod(shape) * dtype.num_bytes != len(data):
            raise InvalidRequestError(
                f"A tensor of {math.prod(shape)} {dtype.value} elements must have"
                f" {math.prod(shape) * dtype.num_bytes} bytes, got {len(data)}.",
                param=f"{param}.data",
            )
        grid = message.grid if message.HasField("grid") else None
        return TensorSource(dtype, shape, _grid(grid, param), BytesSource(data))

    def _tensor_file(self, message: chat_pb2.TensorFile, param: str) -> TensorFileSource:
        check_size(len(message.data), self._limits.max_tensor_bytes, "bytes of a tensor", param)
        if not message.data:
            raise InvalidRequestError("The embedding has no bytes.", param=param)
        grid_data = message.grid_data
        check_size(len(grid_data), self._limits.max_grid_file_bytes, "bytes of a grid", param)
        if grid_data and message.HasField("grid"):
            raise InvalidRequestError("The grid is given twice.", param=f"{param}.grid")
        grid = message.grid if message.HasField("grid") else None
        return TensorFileSource(
            file=BytesSource(message.data),
            grid_file=BytesSource(grid_data) if grid_data else None,
            grid=_grid(grid, param),
        )

    def _check_embeddings_are_taken(self, modality: Modality, param: str) -> None:
        if not self._policy.takes_embeddings:
            raise InvalidRequestError(
                f"You must set `--enable-mm-embeds` to input `{modality.value}_embeds`",
                param=param,
            )


def _grid(message: media_pb2.PatchGrid | None, param: str) -> PatchGrid | None:
    if message is None:
        return None
    if min(message.t, message.h, message.w) < 1:
        raise InvalidRequestError("The sides of a grid must be at least 1.", param=f"{param}.grid")
    return PatchGrid(message.t, message.h, message.w)


def _check_options(options: ProcessingOptions, limits: Limits, param: str) -> None:
    """Refuse wishes without a meaning; what the server allows is settled later."""
    for name in ("min_pixels", "max_pixels", "num_frames"):
        if getattr(options, name) == 0:
            raise InvalidRequestError(f"{name} must be at least 1, got 0.", param=f"{param}.{name}")
    if (options.min_pixels or 0) > (options.max_pixels or math.inf):
        raise InvalidRequestError(
            "min_pixels must not be above max_pixels.", param=f"{param}.min_pixels"
        )
    if options.fps is not None and not 0 < options.fps <= limits.max_fps:
        raise InvalidRequestError(
            f"fps must be above 0 and at most {limits.max_fps:g}, got {options.fps:g}.",
            param=f"{param}.fps",
        )
    if (options.background_rgb or 0) > _MAX_RGB:
        raise InvalidRequestError(
            "background_rgb must be at most 0xFFFFFF.", param=f"{param}.background_rgb"
        )
