"""A small file that holds much sound makes a decode process take what its result takes, no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio

from chiasm.common.families.resampling import resampled_length
from chiasm.common.media import Modality
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_audio import SAMPLE_BYTES, AudioBounds, AudioHeader, AudioTask
from tests.fakes import sounds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MIB = 1 << 20
RATE = 16000
MINUTES = 10
BOUNDS = AudioBounds(
    max_samples=64 * MIB, max_duration_s=600, max_channels=8, min_rate=1000, max_rate=192_000
)
# Room for its libraries and little more.
MEMORY_BYTES = 256 * MIB
# One block of each channel as numbers, mixed down and resampled, and what the codec keeps.
MAX_WORKING_BYTES = 12 * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def tight_decoder() -> AsyncIterator[DecodePool]:
    """Yield one worker that may take little."""
    pool = DecodePool(1, DecodeLimits(MEMORY_BYTES, cpu_limit_s=20, timeout_s=50.0, niceness=0))
    pool.start()
    yield pool
    pool.stop()


async def read_header(decoder: DecodePool, data: bytes) -> AudioHeader:
    body = await decoder.probe(Modality.AUDIO, MemoryFile.of_bytes(data), AudioTask(BOUNDS).pack())
    return AudioHeader.unpack(body)


async def load(decoder: DecodePool, data: bytes, rate: int = RATE) -> np.ndarray:
    header = await read_header(decoder, data)
    num_samples = resampled_length(header.num_frames, header.rate, rate)
    media = await decoder.decode(
        Modality.AUDIO,
        MemoryFile.of_bytes(data),
        AudioTask(BOUNDS, header, rate).pack(),
        num_samples * SAMPLE_BYTES,
    )
    return np.frombuffer(media.memory, np.float32)


def read_status(decoder: DecodePool, field: str) -> int:
    """Return what the kernel tells of the only worker, sizes in KiB."""
    (process,) = decoder._processes
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    assert found is not None
    return int(found[1])


def peak_bytes(decoder: DecodePool) -> int:
    """Return the most resident memory that the only worker ever had."""
    return read_status(decoder, "VmHWM") << 10


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", "PCM_16"), ("OGG", "OPUS")])
async def test_the_header_of_a_bomb_is_read_without_decoding_it(
    tight_decoder: DecodePool, kind: str, subtype: str
) -> None:
    bomb = sounds.silence(60 * MINUTES, 2, 48_000, kind, subtype)
    assert len(bomb) < 200_000

    header = await read_header(tight_decoder, bomb)

    assert header == AudioHeader(60 * MINUTES * 48_000, 48_000, 2)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "M4A"])
async def test_a_worker_has_one_thread(tight_decoder: DecodePool, kind: str) -> None:
    sound = sounds.tone(48_000, 1, 48_000)
    is_m4a = kind == "M4A"
    data = sounds.mux(sound, 48_000, "ipod", "aac") if is_m4a else sounds.write(sound, 48_000, kind)

    await load(tight_decoder, data)

    assert read_status(tight_decoder, "Threads") == 1


def as_mp3s(seconds: int) -> bytes:
    """Return an MP3 of silence that does not tell its length, and is longer than its seconds."""
    second = sounds.mux(np.zeros((48_000, 2), np.float32), 48_000, "mp3", "libmp3lame")
    return sounds.without_length(second) * seconds


def as_flac(seconds: int) -> bytes:
    return sounds.silence(seconds, 2, 48_000, "FLAC", "PCM_16")


@pytest.mark.parametrize("make_silence", [as_flac, as_mp3s])
async def test_a_bomb_is_decoded_in_the_memory_of_its_result(
    make_silence: Callable[[int], bytes],
) -> None:
    seconds = 54 * MINUTES
    bomb = make_silence(seconds)
    pool = DecodePool(1, DecodeLimits(512 * MIB, cpu_limit_s=20, timeout_s=50.0, niceness=0))
    pool.start()
    try:
        await load(pool, make_silence(1))
        before = peak_bytes(pool)

        samples = await load(pool, bomb)

        # 207 MB as its file's samples are read, 35 MB as the model hears it.
        assert len(samples) >= seconds * RATE
        assert peak_bytes(pool) - before < samples.nbytes + len(bomb) + MAX_WORKING_BYTES
    finally:
        pool.stop()


async def test_a_clip_is_decoded_in_pieces_however_little_the_worker_may_take(
    tight_decoder: DecodePool,
) -> None:
    seconds = 60 * MINUTES
    clip = sounds.silence(seconds, 1, 8_000, "FLAC", "PCM_16")
    (process,) = tight_decoder._processes

    samples = await load(tight_decoder, clip, rate=48_000)

    assert len(samples) == 48_000 * seconds
    assert peak_bytes(tight_decoder) < MEMORY_BYTES
    assert tight_decoder._processes == {process}
