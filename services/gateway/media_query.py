"""Ask the store for a media item of a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from chiasm.common.media_resolver import MediaQuery

from .chat_request import UrlSource
from .media_sources import digest_of, num_bytes_of

if TYPE_CHECKING:
    from .chat_request import MediaItem
    from .media_sources import MediaSource

_MAX_BYTES_HASHED_ON_LOOP = 1 << 20


async def query_of(item: MediaItem) -> MediaQuery | None:
    """Return what is asked of the store for ``item``; its bytes are hashed, if it has any.

    ``None``: only the encoder can tell what it is.
    """
    source = item.source
    digest = await _digest(source)
    if source is not None and digest is None and not isinstance(source, UrlSource):
        return None
    return MediaQuery(
        modality=item.modality,
        options=item.options,
        uuid=item.uuid,
        source_digest=digest,
        num_bytes=num_bytes_of(source),
        url=source.url if isinstance(source, UrlSource) else "",
        index=item.index,
        param=item.param,
        is_plain=item.is_plain,
    )


async def _digest(source: MediaSource | None) -> bytes | None:
    if num_bytes_of(source) <= _MAX_BYTES_HASHED_ON_LOOP:
        return digest_of(source)
    return await asyncio.to_thread(digest_of, source)
