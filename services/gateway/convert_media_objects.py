"""Translate the media messages of ``chat.proto`` to domain types and back, checking every field."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from chiasm.common.convert import (
    cache_status_to_proto,
    modality_from_proto,
    modality_to_proto,
)
from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import validate_cache_salt, validate_uuid
from chiasm.common.limits import check_size
from chiasm.common.tenant_scan import ScanCursor
from chiasm.v1 import chat_pb2, media_pb2

from .convert_media import MediaReader
from .media_object import MediaName, MediaRequest, PageRequest

if TYPE_CHECKING:
    from chiasm.common.limits import Limits

    from .media_object import MediaEstimate, MediaObject, MediaPage, MediaReceipt, PutMedia
    from .media_policy import MediaPolicy

_DEFAULT_PAGE_ITEMS = 20
_MS_PER_S = 1000


def put_request_from_proto(
    message: chat_pb2.PutMediaRequest, limits: Limits, policy: MediaPolicy
) -> MediaRequest:
    """Return the checked request of a message; slow for large media: call it in a thread.

    Raises:
        InvalidRequestError: A field is wrong, or there is no source; names it.
        TooLargeError: The item is over its limit.
    """
    if message.media.WhichOneof("source") is None:
        raise InvalidRequestError(
            "There is no media item to keep; send a file, a URL or a data URL.",
            reason="MEDIA_MISSING",
            param="media",
        )
    ttl_s = message.ttl_s if message.HasField("ttl_s") else None
    if ttl_s == 0:
        raise InvalidRequestError("ttl_s must be at least 1.", param="ttl_s")
    return _request(message, MediaReader(limits, policy), limits, ttl_s)


def estimate_request_from_proto(
    message: chat_pb2.EstimateMediaRequest, limits: Limits, policy: MediaPolicy
) -> MediaRequest:
    """Return the checked request of a message; slow for large media: call it in a thread.

    Raises:
        InvalidRequestError: A field is wrong; names it.
        TooLargeError: The item is over its limit.
    """
    return _request(message, MediaReader(limits, policy), limits, None)


def name_from_proto(
    message: chat_pb2.GetMediaRequest | chat_pb2.DeleteMediaRequest,
) -> MediaName:
    """Return the checked name in a message; raise ``InvalidRequestError`` if it is malformed."""
    validate_uuid(message.uuid, "uuid")
    _check_salt(message.cache_salt)
    is_given = message.modality != media_pb2.MODALITY_UNSPECIFIED
    modality = modality_from_proto(message.modality) if is_given else None
    return MediaName(message.uuid, modality, message.cache_salt)


def page_from_proto(message: chat_pb2.ListMediaRequest, limits: Limits) -> PageRequest:
    """Return which page a message asks for, checked.

    Raises:
        InvalidRequestError: A field is wrong; names it.
    """
    _check_salt(message.cache_salt)
    if message.limit > limits.max_page_items:
        raise InvalidRequestError(
            f"limit must be between 1 and {limits.max_page_items}, got {message.limit}.",
            param="limit",
        )
    start = ScanCursor.parse(message.after, "after")
    return PageRequest(message.cache_salt, start, message.limit or _DEFAULT_PAGE_ITEMS)


def object_to_proto(media: MediaObject) -> chat_pb2.MediaObject:
    """Return the message of a kept item."""
    return chat_pb2.MediaObject(
        uuid=media.uuid,
        modality=modality_to_proto(media.modality),
        tokens=media.num_tokens,
        num_bytes=media.num_bytes,
        created_s=media.created_s,
        expires_s=media.expires_s,
        ttl_s=media.ttl_s,
    )


def receipt_to_proto(receipt: MediaReceipt) -> chat_pb2.MediaUsage:
    """Return the message of a receipt."""
    return chat_pb2.MediaUsage(
        uuid=receipt.uuid,
        modality=modality_to_proto(receipt.modality),
        tokens=receipt.num_tokens,
        cache=cache_status_to_proto(receipt.cache_status),
        fetch_ms=receipt.fetch_s * _MS_PER_S,
        decode_ms=receipt.decode_s * _MS_PER_S,
        encode_ms=receipt.encode_s * _MS_PER_S,
    )


def put_to_proto(put: PutMedia) -> chat_pb2.PutMediaResponse:
    """Return the message of an item that is kept now."""
    return chat_pb2.PutMediaResponse(
        media=object_to_proto(put.media), usage=receipt_to_proto(put.receipt)
    )


def page_to_proto(page: MediaPage) -> chat_pb2.ListMediaResponse:
    """Return the message of a page."""
    return chat_pb2.ListMediaResponse(media=map(object_to_proto, page.media), last_id=page.last_id)


def estimate_to_proto(estimate: MediaEstimate) -> chat_pb2.EstimateMediaResponse:
    """Return the message of an estimate."""
    return chat_pb2.EstimateMediaResponse(
        tokens=estimate.num_tokens,
        num_pixels=estimate.num_pixels,
        queue_units=estimate.num_queue_pixels,
        cache=cache_status_to_proto(estimate.cache_status),
    )


def _request(
    message: chat_pb2.PutMediaRequest | chat_pb2.EstimateMediaRequest,
    reader: MediaReader,
    limits: Limits,
    ttl_s: int | None,
) -> MediaRequest:
    _check_salt(message.cache_salt)
    check_size(
        len(message.model), limits.max_model_name_chars, "characters of a model name", "model"
    )
    return MediaRequest(
        request_id=uuid.uuid4().hex,
        model=message.model,
        cache_salt=message.cache_salt,
        item=reader.read(message.media, "media"),
        ttl_s=ttl_s,
    )


def _check_salt(cache_salt: str) -> None:
    if cache_salt:
        validate_cache_salt(cache_salt)
