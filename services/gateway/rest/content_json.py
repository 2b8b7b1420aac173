"""Translate the content of a JSON message to content parts of ``chat.proto``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from chiasm.common.data_url import decode_base64
from chiasm.common.errors import InvalidRequestError
from chiasm.v1 import chat_pb2, media_pb2

from .embeddings_json import EMBEDDING_KINDS, FILE_SCHEME, EmbeddingsReader
from .fields import Fields, type_name
from .inline_images import InlineImage, split_inline_images
from .options_json import take_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.limits import Limits

    from .options_json import RequestOptions

_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_URL_KINDS = {
    "image_url": media_pb2.MODALITY_IMAGE,
    "input_image": media_pb2.MODALITY_IMAGE,
    "video_url": media_pb2.MODALITY_VIDEO,
    "video": media_pb2.MODALITY_VIDEO,
    "audio_url": media_pb2.MODALITY_AUDIO,
    "input_audio": media_pb2.MODALITY_AUDIO,
}
_MODALITIES = {**_URL_KINDS, **EMBEDDING_KINDS}
_INFERRED_TYPES = ("text", *(kind for kind in _MODALITIES if kind != "input_image"))
_BARE_STRING_KINDS = ("input_image", "video")
_FRAME_LIST_START = re.compile(r"data:video/jpeg;base64,", re.IGNORECASE)
_JPEG_START = "data:image/jpeg;base64,"
_AUDIO_FORMAT = re.compile(r"[A-Za-z0-9.+-]{1,32}")


class ContentReader:
    """Reads the contents of one request's messages."""

    def __init__(self, files: Mapping[str, bytes], options: RequestOptions, limits: Limits) -> None:
        """Take what parts refer to.

        Args:
            files: Files that came with the request, by name; parts name them ``cid:NAME``.
            options: Processing options of parts that do not say.
            limits: Bounds on media.
        """
        self._files = files
        self._options = options
        self._limits = limits
        self._embeddings = EmbeddingsReader(self._file, limits)

    def read(
        self, content: object, message: Fields, *, has_inline_images: bool
    ) -> list[chat_pb2.ContentPart]:
        """Return the parts of a message's content.

        Args:
            content: A string, or an array of parts or strings.
            message: The message, whose field ``content`` it is.
            has_inline_images: Whether ``<image>BASE64</image>`` in a string is a picture.

        Raises:
            InvalidRequestError: A part is malformed; names it.
            TooLargeError: A media item is over its limit.
        """
        path = message.param("content")
        if isinstance(content, str):
            if has_inline_images:
                return self._read_string(content, path)
            return [chat_pb2.ContentPart(text=content)]
        if not isinstance(content, list):
            raise InvalidRequestError(
                f"{path} must be a string or an array, got {type_name(content)}.", param=path
            )
        return [
            self._read_part(part, message, f"{path}[{index}]") for index, part in enumerate(content)
        ]

    def _read_string(self, text: str, path: str) -> list[chat_pb2.ContentPart]:
        parts = []
        for piece in split_inline_images(text):
            if isinstance(piece, InlineImage):
                modality = media_pb2.MODALITY_IMAGE
                data = decode_base64(
                    piece.content,
                    max_bytes=self._limits.max_source_bytes,
                    what="The picture in the text",
                    param=path,
                )
                media = chat_pb2.MediaPart(
                    modality=modality, data=data, options=self._options.of(modality)
                )
                parts.append(chat_pb2.ContentPart(media=media))
            else:
                parts.append(chat_pb2.ContentPart(text=piece))
        return parts

    def _read_part(self, part: object, message: Fields, path: str) -> chat_pb2.ContentPart:
        if isinstance(part, str):
            return chat_pb2.ContentPart(text=part)
        if not isinstance(part, dict):
            raise InvalidRequestError(
                f"{path} must be an object, got {type_name(part)}.", param=path
            )
        fields = message.nested(part, path)
        kind = _type_of(fields)
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
        return chat_pb2.ContentPart(media=self._read_media(fields, kind))

    def _read_media(self, fields: Fields, kind: str) -> chat_pb2.MediaPart:
        uuid = fields.take_str("uuid")
        if uuid is not None and not uuid:
            raise fields.error("uuid", "A uuid must not be empty.")
        modality = _MODALITIES[kind]
        media = chat_pb2.MediaPart(
            modality=modality, uuid=uuid or "", options=self._options.of(modality)
        )
        if kind in EMBEDDING_KINDS:
            self._embeddings.read(fields, kind, media)
            take_options(fields, media.options, modality)
            return media
        key = "image_url" if kind == "input_image" else kind
        value = fields.take(key)
        if isinstance(value, dict):
            inner = fields.nested(value, fields.param(key))
            take_options(inner, media.options, modality)
            self._set_url(media, _url_of(inner, kind), inner.param("url"))
        elif isinstance(value, str):
            takes_strings = kind in _BARE_STRING_KINDS or uuid is not None or not fields.has("type")
            if not takes_strings:
                raise fields.wrong_type(key, "an object with a url")
            self._set_url(media, value, fields.param(key))
        elif isinstance(value, list) and kind == "video":
            for index, frame in enumerate(value):
                param = f"{fields.param(key)}[{index}]"
                self._add_frame(media, _url_of_frame(frame, fields, param), param)
        elif value is not None:
            raise fields.wrong_type(key, "an object with a url")
        take_options(fields, media.options, modality)
        return media

    def _set_url(self, media: chat_pb2.MediaPart, url: str, param: str) -> None:
        head = _FRAME_LIST_START.match(url)
        if head and media.modality == media_pb2.MODALITY_VIDEO:
            for content in url[head.end() :].split(",", self._limits.max_listed_frames):
                media.frames.frames.add(url=_JPEG_START + content)
        elif url.startswith(FILE_SCHEME):
            media.data = self._file(url, param)
        elif url:
            media.url = url

    def _add_frame(self, media: chat_pb2.MediaPart, url: str, param: str) -> None:
        if url.startswith(FILE_SCHEME):
            media.frames.frames.add(data=self._file(url, param))
        else:
            media.frames.frames.add(url=url)

    def _file(self, url: str, param: str) -> bytes:
        name = unquote(url[len(FILE_SCHEME) :])
        if name not in self._files:
            raise InvalidRequestError(
                "A cid: URL must name a file part of a multipart/form-data request;"
                f" there is none named '{name[:64]}'.",
                reason="INVALID_MEDIA_URL",
                param=param,
            )
        return self._files[name]


def _type_of(fields: Fields) -> str:
    kind = fields.take("type")
    if isinstance(kind, str):
        return kind
    if kind is not None:
        raise fields.error("type", "Invalid 'type' field in multimodal part.")
    inferred = next((name for name in _INFERRED_TYPES if fields.has(name)), None)
    if inferred is None:
        raise fields.error("type", "Missing 'type' field in multimodal part.")
    return inferred


def _url_of_frame(frame: object, part: Fields, param: str) -> str:
    url = frame
    if isinstance(frame, dict):
        fields = part.nested(frame, param)
        fields.take("type")
        url = fields.take("image_url") if fields.has("image_url") else fields.take("url")
        if isinstance(url, dict):
            url = fields.nested(url, fields.param("image_url")).take("url")
    if not isinstance(url, str):
        raise InvalidRequestError(
            f"{param} must be a URL or an object with one, got {type_name(url)}.", param=param
        )
    return url


def _url_of(fields: Fields, kind: str) -> str:
    if kind != "input_audio":
        return fields.take_str("url") or ""
    data, audio_format = fields.take_str("data"), fields.take_str("format") or "wav"
    if not data:
        return ""
    if not _AUDIO_FORMAT.fullmatch(audio_format):
        raise fields.error("format", "format must be a word such as wav or mp3.")
    if data.startswith(FILE_SCHEME):
        return data
    return f"data:audio/{audio_format};base64,{data}"
