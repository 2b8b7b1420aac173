"""Read the parts of one message as the gateway does, with limits that are easy to reach."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import orjson

from chiasm.common.limits import Limits
from chiasm.gateway.chat_request import MediaItem, TextPart
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.media_sources import contents_of
from chiasm.gateway.rest.chat_json import parse_chat
from chiasm.gateway.rest.multipart import ChatBody

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.gateway.media_sources import MediaSource

SMALL = Limits(
    max_source_bytes=64, max_tensor_bytes=64, max_grid_file_bytes=16, max_listed_frames=2
)


def b64(data: bytes) -> str:
    """Return base64 of ``data``."""
    return base64.b64encode(data).decode()


def parts_of(
    content: object,
    files: Mapping[str, bytes] | None = None,
    limits: Limits = SMALL,
    policy: MediaPolicy | None = None,
    **fields: object,
) -> tuple[TextPart | MediaItem, ...]:
    """Return the parts of a user's message; ``fields`` are further fields of the request."""
    document = orjson.dumps({"messages": [{"role": "user", "content": content}], **fields})
    body = ChatBody(document, files or {})
    return parse_chat(body, "r", limits, policy or MediaPolicy()).request.messages[0].content


def item_of(part: Mapping[str, Any], **kwargs: Any) -> MediaItem:
    """Return the item of a message with one part."""
    (item,) = parts_of([part], **kwargs)
    assert isinstance(item, MediaItem)
    return item


def sent(source: MediaSource | None) -> list[bytes | None]:
    """Return the bytes that go to the encoder for ``source``."""
    return [content.data for content in contents_of(source)]
