"""Translate the bodies of ``/v1/media`` to ``chat.proto`` and its answers to JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import orjson

from chiasm.common.errors import InvalidRequestError
from chiasm.v1 import chat_pb2, media_pb2

from ..convert_media_objects import estimate_request_from_proto, put_request_from_proto
from .body import is_form_type
from .fields import Fields, type_name
from .form import parse_form
from .options_json import take_options

if TYPE_CHECKING:
    from chiasm.common.limits import Limits

    from ..media_object import (
        MediaEstimate,
        MediaObject,
        MediaPage,
        MediaReceipt,
        MediaRequest,
        PutMedia,
    )
    from ..media_policy import MediaPolicy
    from .form import FormPart

MODALITIES = {
    "image": media_pb2.MODALITY_IMAGE,
    "video": media_pb2.MODALITY_VIDEO,
    "audio": media_pb2.MODALITY_AUDIO,
}

_FILE = "file"
_MAX_PARTS = 32
_MAX_FIELD_BYTES = 64 * 1024
_MAX_UINT32 = (1 << 32) - 1
_MAX_SHOWN_CHARS = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?")  # of JSON
_TEXT_FIELDS = ("uuid", "modality", "url", "cache_salt", "model")
_CONTENT_KIND = re.compile(r"(?:data:)?\s*(image|video|audio)/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MediaBody:
    """A body of ``/v1/media``.

    Attributes:
        data: JSON, or a form with the media in the part named ``file``.
        content_type: The request's content type.
        request_id: Id of the call.
    """

    data: bytes
    content_type: str
    request_id: str


def parse_put(body: MediaBody, limits: Limits, policy: MediaPolicy) -> MediaRequest:
    """Return the checked request of ``POST /v1/media``; slow for large bodies: call it in a thread.

    Args:
        body: The body.
        limits: Bounds on the request.
        policy: What the server allows of media.

    Raises:
        InvalidRequestError: The body is malformed or a field is wrong; names it.
        TooLargeError: The item is over its limit.
    """
    fields, file = _read(body.data, body.content_type)
    message = chat_pb2.PutMediaRequest(model=fields.take_str("model") or "")
    ttl_s = fields.take_int_within("ttl_s", 1, _MAX_UINT32)
    if ttl_s is not None:
        message.ttl_s = ttl_s
    message.cache_salt = fields.take_str("cache_salt") or ""
    _take_media(fields, file, message.media)
    request = put_request_from_proto(message, limits, policy)
    return replace(request, request_id=body.request_id)


def parse_estimate(body: MediaBody, limits: Limits, policy: MediaPolicy) -> MediaRequest:
    """Return the checked request of ``POST /v1/media:estimate``; otherwise as ``parse_put``."""
    fields, file = _read(body.data, body.content_type)
    message = chat_pb2.EstimateMediaRequest(model=fields.take_str("model") or "")
    message.cache_salt = fields.take_str("cache_salt") or ""
    _take_media(fields, file, message.media)
    request = estimate_request_from_proto(message, limits, policy)
    return replace(request, request_id=body.request_id)


def put_to_json(put: PutMedia) -> bytes:
    """Return the JSON of an item that is kept now, with what that took."""
    return orjson.dumps({**_object(put.media), "usage": receipt_to_json(put.receipt)})


def object_to_json(media: MediaObject) -> bytes:
    """Return the JSON of a kept item."""
    return orjson.dumps(_object(media))


def page_to_json(page: MediaPage) -> bytes:
    """Return the JSON of a page."""
    return orjson.dumps(
        {
            "object": "list",
            "data": [_object(media) for media in page.media],
            "has_more": bool(page.last_id),
            "last_id": page.last_id or None,
        }
    )


def estimate_to_json(estimate: MediaEstimate) -> bytes:
    """Return the JSON of an estimate."""
    return orjson.dumps(
        {
            "object": "media.estimate",
            "tokens": estimate.num_tokens,
            "pixels": estimate.num_pixels,
            "queue_units": estimate.num_queue_pixels,
            "cache": estimate.cache_status.value,
        }
    )


def receipt_to_json(receipt: MediaReceipt) -> dict[str, object]:
    """Return the JSON object that tells how an item came to be available."""
    return {
        "uuid": receipt.uuid or None,
        "modality": receipt.modality.value,
        "tokens": receipt.num_tokens,
        "cache": receipt.cache_status.value,
        "fetch_ms": _milliseconds(receipt.fetch_s),
        "decode_ms": _milliseconds(receipt.decode_s),
        "encode_ms": _milliseconds(receipt.encode_s),
    }


def _object(media: MediaObject) -> dict[str, object]:
    return {
        "uuid": media.uuid,
        "object": "media",
        "modality": media.modality.value,
        "tokens": media.num_tokens,
        "bytes": media.num_bytes or None,
        "created_at": media.created_s,
        "expires_at": media.expires_s,
        "ttl_s": media.ttl_s,
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _read(body: bytes, content_type: str) -> tuple[Fields, FormPart | None]:
    if is_form_type(content_type):
        return _read_form(body, content_type)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"The body must be an object, got {type_name(document)}.")
    return Fields(document), None


def _read_form(body: bytes, content_type: str) -> tuple[Fields, FormPart | None]:
    values: dict[str, object] = {}
    file = None
    for part in parse_form(body, content_type, _MAX_PARTS):
        if part.name in values or (part.name == _FILE and file is not None):
            raise InvalidRequestError(
                f"The form has two parts named '{part.name[:_MAX_SHOWN_CHARS]}'."
            )
        if part.name == _FILE:
            file = part
        else:
            values[part.name] = _form_value(part)
    return Fields(values), file


def _form_value(part: FormPart) -> object:
    if part.name != "url" and len(part.data) > _MAX_FIELD_BYTES:
        raise InvalidRequestError(
            f"The part must have at most {_MAX_FIELD_BYTES} bytes.", param=part.name
        )
    try:
        text = part.data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("The part must be UTF-8 text.", param=part.name) from None
    if part.name not in _TEXT_FIELDS and _NUMBER.fullmatch(text):
        return orjson.loads(text)
    return text


def _take_media(fields: Fields, file: FormPart | None, media: chat_pb2.MediaPart) -> None:
    media.uuid = fields.take_str("uuid") or ""
    url = fields.take_str("url")
    if url and file:
        raise fields.error("url", "Send either a file or a url, not both.")
    if file is not None:
        media.data = file.data
    elif url:
        media.url = url
    media.modality = _take_modality(fields, file.content_type if file else url or "")
    take_options(fields, media.options, media.modality)
    unknown = fields.untaken()
    if unknown:
        name = unknown[0][:_MAX_SHOWN_CHARS]
        raise InvalidRequestError(f"'{name}' is not a field of this request.", param=name)


def _take_modality(fields: Fields, content_type: str) -> media_pb2.Modality.ValueType:
    """Return the modality that the field names, or else the one that the content type tells."""
    name = fields.take_str("modality")
    if name is None:
        found = _CONTENT_KIND.match(content_type)
        name = found[1].lower() if found else ""
    if name not in MODALITIES:
        raise fields.error("modality", f"modality must be one of {', '.join(MODALITIES)}.")
    return MODALITIES[name]
