"""Sources come in within their limits, are charged, and are told apart by their digests."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import InvalidRequestError, OverloadedError, TooLargeError
from chiasm.common.identity import source_digest
from chiasm.common.media import Modality
from chiasm.encoder import source_reader
from chiasm.encoder.admission import Admission, AdmissionLimits
from chiasm.encoder.commands import BytesSource, FileSource, UrlSource
from chiasm.encoder.fetch import FetchLimits, MediaFetcher
from chiasm.encoder.local_files import LocalFiles
from chiasm.encoder.source_reader import SourceData, SourceReader
from chiasm.encoder.url_policy import UrlPolicy
from tests.fakes.media_server import FakeResolver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MAX_BYTES = 100


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def read(
    source: FileSource, max_queue_bytes: int = 1000, root: Path | None = None
) -> SourceData:
    """Read a source; no http URL can be fetched."""
    fetcher = MediaFetcher(UrlPolicy(), FetchLimits(MAX_BYTES, 0, {}), FakeResolver({}))
    admission = Admission(AdmissionLimits(1, max_queue_bytes, 1000))
    with admission.admit() as ticket:
        reader = SourceReader(fetcher, LocalFiles(root), MAX_BYTES)
        return await reader.read(source, Modality.IMAGE, ticket)


def data_url(data: bytes) -> UrlSource:
    return UrlSource("data:image/png;base64," + base64.b64encode(data).decode())


async def test_chunks_are_joined_and_digested() -> None:
    data = await read(BytesSource(5, chunks(b"ab", b"", b"cde")))

    assert os.pread(data.memory.fd, 100, 0) == b"abcde"
    assert data.digest == source_digest(b"abcde")
    assert data.fetch_s == 0.0


async def test_a_data_url_is_the_same_source_as_its_bytes() -> None:
    assert (await read(data_url(b"abcde"))).digest == source_digest(b"abcde")


async def test_sources_of_the_largest_size_pass_and_one_byte_more_does_not() -> None:
    fits, large = b"x" * MAX_BYTES, b"x" * (MAX_BYTES + 1)

    await read(BytesSource(len(fits), chunks(fits)))
    await read(data_url(fits))
    for source in (BytesSource(len(large), chunks(large)), data_url(large)):
        with pytest.raises(TooLargeError):
            await read(source)


async def test_sources_over_the_queues_bytes_are_refused() -> None:
    data = b"x" * 50

    await read(BytesSource(50, chunks(data)), max_queue_bytes=50)
    for source in (BytesSource(50, chunks(data)), data_url(data)):
        with pytest.raises(OverloadedError):
            await read(source, max_queue_bytes=49)


@pytest.mark.parametrize("pieces", [[], [b"abcd"], [b"abc", b"def"]])
async def test_other_sizes_than_announced_are_refused(pieces: list[bytes]) -> None:
    with pytest.raises(InvalidRequestError, match="5 bytes were announced"):
        await read(BytesSource(5, chunks(*pieces)))


async def test_empty_sources_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="it is empty"):
        await read(BytesSource(0, chunks()))


async def test_a_data_url_is_charged_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_reader, "decode_data_url", lambda *_, **__: pytest.fail("decoded"))

    with pytest.raises(OverloadedError):
        await read(data_url(b"x" * 50), max_queue_bytes=49)


async def test_a_file_is_the_same_source_as_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"abcde")

    data = await read(UrlSource(f"file://{tmp_path}/a%20b.png"), root=tmp_path)

    assert data.digest == source_digest(b"abcde")


async def test_files_are_bounded_like_other_sources(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(b"x" * MAX_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    fits, large = (UrlSource(f"file://{tmp_path}/{name}") for name in ("fits", "large"))

    await read(fits, max_queue_bytes=MAX_BYTES, root=tmp_path)
    with pytest.raises(TooLargeError):
        await read(large, root=tmp_path)
    with pytest.raises(OverloadedError):
        await read(fits, max_queue_bytes=MAX_BYTES - 1, root=tmp_path)
