"""Translate wishes for the processing of media: of one part, of a request, of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.v1 import media_pb2

from .fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_UINT32 = (1 << 32) - 1
_LOW_DETAIL_PIXELS = 512 * 512
_DETAILS = ("auto", "low", "high", "original")
_SECTIONS = {
    "image": media_pb2.MODALITY_IMAGE,
    "video": media_pb2.MODALITY_VIDEO,
    "audio": media_pb2.MODALITY_AUDIO,
}
_PROCESSOR_SECTIONS = {
    "images_kwargs": media_pb2.MODALITY_IMAGE,
    "videos_kwargs": media_pb2.MODALITY_VIDEO,
    "audio_kwargs": media_pb2.MODALITY_AUDIO,
}


class RequestOptions:
    """Processing options of parts that do not say, by modality.

    Attributes:
        ignored: Paths of the fields that had no effect.
    """

    def __init__(
        self,
        processor_kwargs: Mapping[str, object] | None = None,
        media_io_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        """Read both objects.

        Args:
            processor_kwargs: ``mm_processor_kwargs``: options of all modalities, or one object
                for each.
            media_io_kwargs: ``media_io_kwargs``: one object for each modality.

        Raises:
            InvalidRequestError: A value is wrong; names the field.
        """
        self._options = {modality: media_pb2.ProcessingOptions() for modality in _SECTIONS.values()}
        self.ignored: list[str] = []
        processor = Fields(processor_kwargs or {}, "mm_processor_kwargs")
        for modality, options in self._options.items():
            take_options(processor, options, modality)
        self._take_sections(processor, _PROCESSOR_SECTIONS)
        self._take_sections(Fields(media_io_kwargs or {}, "media_io_kwargs"), _SECTIONS)

    def of(self, modality: media_pb2.Modality.ValueType) -> media_pb2.ProcessingOptions:
        """Return the options of a modality; do not change them."""
        return self._options[modality]

    def _take_sections(
        self, fields: Fields, sections: Mapping[str, media_pb2.Modality.ValueType]
    ) -> None:
        for name, modality in sections.items():
            section = fields.take_object(name)
            if section is not None:
                inner = Fields(section, fields.param(name))
                take_options(inner, self._options[modality], modality)
                self._ignore_rest(inner)
        self._ignore_rest(fields)

    def _ignore_rest(self, fields: Fields) -> None:
        self.ignored += map(fields.param, fields.untaken())


def take_options(
    fields: Fields,
    options: media_pb2.ProcessingOptions,
    modality: media_pb2.Modality.ValueType,
) -> None:
    """Move the processing options among ``fields`` that mean something to ``modality``.

    Args:
        fields: What the client wrote.
        options: Changed in place.
        modality: Kind of the item.

    Raises:
        InvalidRequestError: A value is out of its range, or the bounds contradict.
    """
    if modality == media_pb2.MODALITY_AUDIO:
        return
    min_pixels = fields.take_int_within("min_pixels", 1, _MAX_UINT32)
    max_pixels = fields.take_int_within("max_pixels", 1, _MAX_UINT32)
    if min_pixels is not None:
        options.min_pixels = min_pixels
    if max_pixels is not None:
        options.max_pixels = max_pixels
    if modality == media_pb2.MODALITY_IMAGE:
        _take_detail(fields, options)
        _take_background(fields, options)
    else:
        _take_sampling(fields, options)
    has_both = options.HasField("min_pixels") and options.HasField("max_pixels")
    if has_both and options.min_pixels > options.max_pixels:
        raise fields.error("min_pixels", "min_pixels must not be above max_pixels.")


def _take_detail(fields: Fields, options: media_pb2.ProcessingOptions) -> None:
    """``low`` bounds the pixels; the other words leave them as they are."""
    detail = fields.take_str("detail")
    if detail is None:
        return
    if detail not in _DETAILS:
        raise fields.error("detail", f"detail must be one of {', '.join(_DETAILS)}.")
    if detail == "low":
        wished = options.max_pixels if options.HasField("max_pixels") else _MAX_UINT32
        options.max_pixels = min(wished, _LOW_DETAIL_PIXELS)
        if options.HasField("min_pixels"):
            options.min_pixels = min(options.min_pixels, options.max_pixels)


def _take_background(fields: Fields, options: media_pb2.ProcessingOptions) -> None:
    name = "rgba_background_color"
    colour = fields.take_list(name)
    if colour is None:
        return
    is_opaque = len(colour) == 3 or (len(colour) == 4 and colour[3] == 255)
    channels = [value for value in colour[:3] if type(value) is int and 0 <= value <= 255]
    if not is_opaque or len(channels) != 3:
        raise fields.error(
            name, f"{name} must be 3 integers between 0 and 255: red, green and blue."
        )
    options.background_rgb = int.from_bytes(channels, "big")


def _take_sampling(fields: Fields, options: media_pb2.ProcessingOptions) -> None:
    fps = fields.take_number("fps")
    if fps is not None:
        options.fps = fps
    num_frames = fields.take_int_within("num_frames", -1, _MAX_UINT32)
    if num_frames == 0:
        raise fields.error("num_frames", "num_frames must be at least 1, or -1 for all; got 0.")
    if num_frames is not None and num_frames > 0:
        options.num_frames = num_frames
