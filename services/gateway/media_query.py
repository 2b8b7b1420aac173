"""Ask the store for a media item of a request."""

from __future__ import annotations

import asyncio

from chiasm.common.identity import source_digest
from chiasm.common.media_resolver import MediaQuery

from .chat_request import BytesSource, MediaItem, UrlSource

_MAX_BYTES_HASHED_ON_LOOP = 1 << 20


async def query_of(item: MediaItem) -> MediaQuery:
    """Return what is asked of the store for ``item``; its bytes are hashed, if it has any."""
    source = item.source
    data = source.data if isinstance(source, BytesSource) else None
    return MediaQuery(
        modality=item.modality,
        options=item.options,
        uuid=item.uuid,
        source_digest=await _digest(data) if data is not None else None,
        num_bytes=len(data or b""),
        url=source.url if isinstance(source, UrlSource) else "",
        index=item.index,
        param=item.param,
    )


async def _digest(data: bytes) -> bytes:
    if len(data) <= _MAX_BYTES_HASHED_ON_LOOP:
        return source_digest(data)
    return await asyncio.to_thread(source_digest, data)
