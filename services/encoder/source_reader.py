"""Bring the bytes of an item in: from a URL of any kind or from the request stream."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.data_url import decode_data_url, is_data_url
from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import source_digest
from chiasm.common.limits import check_size
from chiasm.common.metrics import MEDIA_DOWNLOAD_BYTES, MEDIA_DOWNLOAD_LATENCY_SECONDS
from chiasm.encoder.commands import BytesSource
from chiasm.encoder.decode_pool import invalid_media
from chiasm.encoder.local_files import is_file_url
from chiasm.encoder.memory_file import MemoryFile

if TYPE_CHECKING:
    from chiasm.common.media import Modality
    from chiasm.encoder.admission import AdmissionTicket
    from chiasm.encoder.commands import FileSource
    from chiasm.encoder.fetch import MediaFetcher
    from chiasm.encoder.local_files import LocalFiles

_SCHEMES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class SourceData:
    """The bytes of an item, their digest, and the seconds that fetching took (0 if it was sent)."""

    memory: MemoryFile
    digest: bytes
    fetch_s: float

    @property
    def num_bytes(self) -> int:
        """Bytes of the item."""
        return self.memory.num_bytes


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """The bytes of an item, and the seconds that fetching took (0 if it was sent)."""

    data: bytes | bytearray
    fetch_s: float


class SourceReader:
    """Reads sources within ``max_bytes``."""

    def __init__(self, fetcher: MediaFetcher, local_files: LocalFiles, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._local_files = local_files
        self._max_bytes = max_bytes

    async def read(
        self, source: FileSource, modality: Modality, ticket: AdmissionTicket
    ) -> SourceData:
        """Return the bytes of a source in a memory file, and their digest; see ``load``."""
        loaded = await self.load(source, modality, ticket)
        return await asyncio.to_thread(_keep, loaded)

    async def load(
        self, source: FileSource, modality: Modality, ticket: AdmissionTicket
    ) -> LoadedFile:
        """Return the bytes of a source, charged to ``ticket``.

        Raises:
            InvalidRequestError: URL or stream are malformed, or there are no bytes.
            MediaFetchError: The URL could not be fetched.
            TooLargeError: There are too many bytes.
            OverloadedError: The sources in work take too many bytes together.
        """
        data: bytes | bytearray
        fetch_s = 0.0
        if isinstance(source, BytesSource):
            check_size(source.num_bytes, self._max_bytes, "bytes of media", "bytes.num_bytes")
            data = await self.collect(source, ticket)
        elif is_data_url(source.url):
            data = await self._decode(source.url, ticket)
        elif is_file_url(source.url):
            data = await self._local_files.read(source.url, self._max_bytes, ticket.charge_source)
        else:
            data, fetch_s = await self._fetch(source.url, modality, ticket)
        if not data:
            raise invalid_media(modality, "it is empty")
        return LoadedFile(data, fetch_s)

    async def collect(self, source: BytesSource, ticket: AdmissionTicket) -> bytearray:
        """Return the bytes of a stream whose announced number was checked, charged to ``ticket``.

        Raises:
            InvalidRequestError: Another number of bytes came.
            OverloadedError: The sources in work take too many bytes together.
        """
        ticket.charge_source(source.num_bytes)
        data = bytearray()
        async for chunk in source.chunks:
            data += chunk
            if len(data) > source.num_bytes:
                break
        if len(data) != source.num_bytes:
            raise InvalidRequestError(
                f"{source.num_bytes} bytes were announced but"
                f" {'more' if len(data) > source.num_bytes else len(data)} came.",
                param="chunk",
            )
        return data

    async def _decode(self, url: str, ticket: AdmissionTicket) -> bytes:
        # Up to two bytes more than the content has: padding is not looked at.
        max_decoded_bytes = (len(url) - url.find(",") - 1) // 4 * 3
        check_size(max_decoded_bytes, self._max_bytes + 2, "bytes of media", "url")
        ticket.charge_source(max_decoded_bytes)
        return await asyncio.to_thread(decode_data_url, url, max_bytes=self._max_bytes, param="url")

    async def _fetch(
        self, url: str, modality: Modality, ticket: AdmissionTicket
    ) -> tuple[bytearray, float]:
        _check_scheme(url)
        started = time.monotonic()
        data = await self._fetcher.fetch(url, modality, ticket.charge_source)
        fetch_s = time.monotonic() - started
        MEDIA_DOWNLOAD_LATENCY_SECONDS.labels(modality.value).observe(fetch_s)
        MEDIA_DOWNLOAD_BYTES.labels(modality.value).inc(len(data))
        return data, fetch_s


def _check_scheme(url: str) -> None:
    if not url[:8].lower().startswith(_SCHEMES):
        raise InvalidRequestError(
            "The URL must be either a HTTP, data or file URL.", reason="INVALID_MEDIA_URL"
        )


def _keep(loaded: LoadedFile) -> SourceData:
    memory = MemoryFile.of_bytes(loaded.data)
    return SourceData(memory, source_digest(loaded.data), loaded.fetch_s)
