"""Bring in a video that comes as a list of pictures, some sent and some behind URLs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from chiasm.common.errors import ChiasmError
from chiasm.common.identity import frames_digest, source_digest
from chiasm.common.limits import check_size
from chiasm.common.media import Modality
from chiasm.encoder.commands import BytesSource, UrlSource
from chiasm.encoder.decode_pool import invalid_media
from chiasm.encoder.frame_list import pack_frames
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.source_reader import SourceData

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.encoder.admission import AdmissionTicket
    from chiasm.encoder.commands import FramesSource
    from chiasm.encoder.source_reader import SourceReader

_MAX_FETCHES = 8


class FramesReader:
    """Reads lists of frames whose files have at most ``max_bytes`` together."""

    def __init__(self, reader: SourceReader, max_bytes: int) -> None:
        self._reader = reader
        self._max_bytes = max_bytes

    async def read(self, source: FramesSource, ticket: AdmissionTicket) -> SourceData:
        """Return the frames as one run of bytes (``frame_list.py``), charged to ``ticket``.

        Raises:
            InvalidRequestError: A URL or the stream is malformed, or a frame has no bytes.
            MediaFetchError: A URL could not be fetched.
            TooLargeError: There are too many bytes.
            OverloadedError: The sources in work take too many bytes together.
        """
        sizes = [frame for frame in source.frames if isinstance(frame, int)]
        check_size(sum(sizes), self._max_bytes, "bytes of media", "frames")
        if not all(sizes):
            raise invalid_media(Modality.VIDEO, "a frame is empty")
        sent = await self._reader.collect(BytesSource(sum(sizes), source.chunks), ticket)
        started = time.monotonic()
        urls = [frame for frame in source.frames if isinstance(frame, UrlSource)]
        loaded = iter(await self._load(urls, len(sent), ticket))
        fetch_s = time.monotonic() - started if urls else 0.0
        frames: list[bytes | bytearray] = []
        offset = 0
        for frame in source.frames:
            if isinstance(frame, UrlSource):
                frames.append(next(loaded))
            else:
                frames.append(sent[offset : offset + frame])
                offset += frame
        return await asyncio.to_thread(_keep, frames, fetch_s)

    async def _load(
        self, urls: Sequence[UrlSource], num_bytes: int, ticket: AdmissionTicket
    ) -> list[bytes | bytearray]:
        """Return the bytes behind ``urls``, a few at a time; the first failure ends the rest."""
        places = asyncio.Semaphore(_MAX_FETCHES)
        total = num_bytes

        async def load(url: UrlSource) -> bytes | bytearray:
            nonlocal total
            async with places:
                data = (await self._reader.load(url, Modality.IMAGE, ticket)).data
            total += len(data)
            check_size(total, self._max_bytes, "bytes of media", "frames")
            return data

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(load(url)) for url in urls]
        except ExceptionGroup as failures:
            known = [error for error in failures.exceptions if isinstance(error, ChiasmError)]
            raise (known or failures.exceptions)[0] from None
        return [task.result() for task in tasks]


def _keep(frames: Sequence[bytes | bytearray], fetch_s: float) -> SourceData:
    digest = frames_digest([source_digest(frame) for frame in frames])
    return SourceData(MemoryFile.of_bytes(pack_frames(frames)), digest, fetch_s)
