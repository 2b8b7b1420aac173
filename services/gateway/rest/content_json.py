"""Translate the content of a JSON message to content parts of ``chat.proto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.v1 import chat_pb2, media_pb2

from .fields import Fields, type_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_UINT32 = (1 << 32) - 1
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_MODALITIES = {
    "image_url": media_pb2.MODALITY_IMAGE,
    "input_image": media_pb2.MODALITY_IMAGE,
    "video_url": media_pb2.MODALITY_VIDEO,
    "audio_url": media_pb2.MODALITY_AUDIO,
    "input_audio": media_pb2.MODALITY_AUDIO,
}
_KEYS = {**dict.fromkeys(_MODALITIES), "input_image": "image_url"}
_INFERRED_TYPES = ("text", "image_url", "video_url", "audio_url", "input_audio")


def content_to_proto(
    content: object, path: str, defaults: media_pb2.ProcessingOptions
) -> list[chat_pb2.ContentPart]:
    """Return the parts of a message's content.

    Args:
        content: A string, or an array of parts or strings.
        path: Path of the content in the request, for errors.
        defaults: Processing options of parts that do not say.

    Raises:
        InvalidRequestError: A part is malformed; names it.
    """
    if isinstance(content, str):
        return [chat_pb2.ContentPart(text=content)]
    if not isinstance(content, list):
        raise InvalidRequestError(
            f"{path} must be a string or an array, got {type_name(content)}.", param=path
        )
    return [
        _part_to_proto(part, f"{path}[{index}]", defaults) for index, part in enumerate(content)
    ]


def take_options(fields: Fields, options: media_pb2.ProcessingOptions) -> None:
    """Move the processing options among ``fields`` into ``options``.

    Raises:
        InvalidRequestError: A value is not a positive integer, or the bounds contradict.
    """
    min_pixels = fields.take_int_within("min_pixels", 1, _MAX_UINT32)
    max_pixels = fields.take_int_within("max_pixels", 1, _MAX_UINT32)
    if min_pixels is not None:
        options.min_pixels = min_pixels
    if max_pixels is not None:
        options.max_pixels = max_pixels
    has_both = options.HasField("min_pixels") and options.HasField("max_pixels")
    if has_both and options.min_pixels > options.max_pixels:
        raise fields.error("min_pixels", "min_pixels must not be above max_pixels.")


def _part_to_proto(
    part: object, path: str, defaults: media_pb2.ProcessingOptions
) -> chat_pb2.ContentPart:
    if isinstance(part, str):
        return chat_pb2.ContentPart(text=part)
    if not isinstance(part, dict):
        raise InvalidRequestError(f"{path} must be an object, got {type_name(part)}.", param=path)
    fields = Fields(part, path)
    kind = _type_of(part, path)
    if kind in _TEXT_KEYS:
        text = fields.take_str(_TEXT_KEYS[kind])
        if text is None:
            raise fields.wrong_type(_TEXT_KEYS[kind], "a string")
        return chat_pb2.ContentPart(text=text)
    if kind not in _MODALITIES:
        supported = ", ".join(f"'{name}'" for name in (*_TEXT_KEYS, *_MODALITIES))
        raise fields.error(
            "type",
            f"Unsupported chat content part type: '{kind[:64]}'. Supported types: {supported}.",
        )
    return chat_pb2.ContentPart(media=_media_to_proto(fields, kind, defaults))


def _type_of(part: Mapping[str, object], path: str) -> str:
    kind = part.get("type")
    if isinstance(kind, str):
        return kind
    param = f"{path}.type"
    if kind is not None:
        raise InvalidRequestError("Invalid 'type' field in multimodal part.", param=param)
    inferred = next((name for name in _INFERRED_TYPES if name in part), None)
    if inferred is None:
        raise InvalidRequestError("Missing 'type' field in multimodal part.", param=param)
    return inferred


def _media_to_proto(
    fields: Fields, kind: str, defaults: media_pb2.ProcessingOptions
) -> chat_pb2.MediaPart:
    uuid = fields.take_str("uuid")
    if uuid is not None and not uuid:
        raise fields.error("uuid", "A uuid must not be empty.")
    media = chat_pb2.MediaPart(modality=_MODALITIES[kind], uuid=uuid or "", options=defaults)
    key = _KEYS[kind] or kind
    value = fields.take(key)
    if isinstance(value, dict):
        inner = Fields(value, fields.param(key))
        take_options(inner, media.options)
        url = _url_of(inner, kind)
    elif isinstance(value, str):
        takes_strings = kind == "input_image" or uuid is not None or not fields.has("type")
        if not takes_strings:
            raise fields.wrong_type(key, "an object with a url")
        url = value
    elif value is None:
        url = ""
    else:
        raise fields.wrong_type(key, "an object with a url")
    take_options(fields, media.options)
    if url:
        media.url = url
    return media


def _url_of(fields: Fields, kind: str) -> str:
    if kind == "input_audio":
        data, audio_format = fields.take_str("data"), fields.take_str("format")
        return f"data:audio/{audio_format};base64,{data}" if data else ""
    return fields.take_str("url") or ""
