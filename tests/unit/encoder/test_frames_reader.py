"""Frames come in one by one, bounded together, and keep their order."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import (
    InvalidRequestError,
    MediaFetchError,
    OverloadedError,
    TooLargeError,
)
from chiasm.common.identity import frames_digest, source_digest
from chiasm.encoder.admission import Admission, AdmissionLimits
from chiasm.encoder.commands import FramesSource, UrlSource
from chiasm.encoder.fetch import FetchLimits, MediaFetcher
from chiasm.encoder.frame_list import split_frames
from chiasm.encoder.frames_reader import FramesReader
from chiasm.encoder.local_files import LocalFiles
from chiasm.encoder.source_reader import SourceReader
from chiasm.encoder.url_policy import UrlPolicy
from tests.fakes.media_server import FakeResolver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from chiasm.encoder.source_reader import SourceData

MAX_BYTES = 100


async def read(
    frames: list[bytes | str], root: Path, max_queue_bytes: int = 1000, sent: bytes | None = None
) -> SourceData:
    """Read frames; texts are URLs."""

    async def chunks() -> AsyncIterator[bytes]:
        stream = b"".join(f for f in frames if isinstance(f, bytes)) if sent is None else sent
        for start in range(0, len(stream), 3):
            yield stream[start : start + 3]

    fetcher = MediaFetcher(UrlPolicy(), FetchLimits(MAX_BYTES, 0, {}), FakeResolver({}))
    reader = FramesReader(SourceReader(fetcher, LocalFiles(root), MAX_BYTES), MAX_BYTES)
    source = FramesSource(
        tuple(UrlSource(frame) if isinstance(frame, str) else len(frame) for frame in frames),
        chunks(),
    )
    admission = Admission(AdmissionLimits(1, max_queue_bytes, 1000))
    with admission.admit() as ticket:
        return await reader.read(source, ticket)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def test_sent_frames_and_urls_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "four").write_bytes(b"four")
    frames: list[bytes | str] = [b"first", data_url(b"two"), b"3", f"file://{tmp_path}/four"]

    data = await read(frames, tmp_path)

    files = [b"first", b"two", b"3", b"four"]
    assert split_frames(os.pread(data.memory.fd, 1000, 0)) == files
    assert data.digest == frames_digest([source_digest(file) for file in files])


async def test_all_frames_together_are_bounded(tmp_path: Path) -> None:
    half = bytes(MAX_BYTES // 2)
    kinds: list[list[bytes | str]] = [
        [half, half],
        [half, data_url(half)],
        [data_url(half), data_url(half)],
    ]
    for frames in kinds:
        await read(frames, tmp_path)
        with pytest.raises(TooLargeError, match="101 bytes of media is over the limit of 100"):
            await read([*frames, b"x"], tmp_path)
        with pytest.raises(TooLargeError, match="101 bytes of media is over the limit of 100"):
            await read([*frames, data_url(b"x")], tmp_path)


async def test_frames_are_charged_to_the_queue(tmp_path: Path) -> None:
    frames: list[bytes | str] = [bytes(30), data_url(bytes(30))]
    await read(frames, tmp_path, max_queue_bytes=60)
    with pytest.raises(OverloadedError):
        await read(frames, tmp_path, max_queue_bytes=59)


async def test_one_frame_that_cannot_be_had_fails_the_video(tmp_path: Path) -> None:
    many = [data_url(b"x")] * 20
    with pytest.raises(MediaFetchError, match="the file cannot be read"):
        await read([*many, f"file://{tmp_path}/missing", *many], tmp_path)
    with pytest.raises(InvalidRequestError, match="either a HTTP, data or file URL"):
        await read(["ftp://a/b"], tmp_path)


@pytest.mark.parametrize("sent", [b"abc", b"abcde"])
async def test_another_number_of_bytes_than_announced_is_refused(
    tmp_path: Path, sent: bytes
) -> None:
    with pytest.raises(InvalidRequestError, match="4 bytes were announced"):
        await read([b"ab", b"cd"], tmp_path, sent=sent)


async def test_an_empty_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="Failed to load video: a frame is empty"):
        await read([b"ab", b""], tmp_path)
