"""The header of an MP3's encoder is found where it may be, and doubted where it cannot be true."""

from __future__ import annotations

import pytest

from chiasm.encoder.mp3_header import tells_length

MPEG_1, MPEG_2 = 0xFB, 0xF3
STEREO, MONO = 0x44, 0xC4
EMPTY_TAG = b"ID3\4\0\0\0\0\0\0"
FOOTED_TAG = b"ID3\4\0\x10\0\0\1\2" + bytes(130) + b"3DI\4\0\x10\0\0\1\2"


def first_frame(
    num_zeros: int = 32,
    version: int = MPEG_1,
    channels: int = STEREO,
    counts: tuple[bytes, int, int, int] = (b"Xing", 3, 100, 4000),
) -> bytes:
    """Return a first frame that ends behind its counts: tag, flags, frames and bytes."""
    tag, *numbers = counts
    fields = b"".join(number.to_bytes(4, "big") for number in numbers)
    return bytes([0xFF, version, 0x90, channels]) + bytes(num_zeros) + tag + fields


def padded(start: bytes, size: int = 4000) -> bytes:
    return start.ljust(size, b"\1")


@pytest.mark.parametrize(
    ("version", "channels", "num_zeros"),
    [
        (MPEG_1, STEREO, 32),
        (MPEG_1, MONO, 17),
        (MPEG_2, STEREO, 17),
        (MPEG_2, MONO, 9),
        (MPEG_1 - 1, STEREO, 34),
    ],
)
@pytest.mark.parametrize("tags", [b"", EMPTY_TAG, FOOTED_TAG, EMPTY_TAG + FOOTED_TAG])
def test_counts_are_found_behind_tags_and_zeros(
    tags: bytes, version: int, channels: int, num_zeros: int
) -> None:
    assert tells_length(tags + padded(first_frame(num_zeros, version, channels)))


def test_counts_of_one_bit_rate_have_another_name() -> None:
    assert tells_length(padded(first_frame(counts=(b"Info", 0xF, 100, 4000))))


@pytest.mark.parametrize(
    "counts",
    [
        (b"VBRI", 3, 100, 4000),
        (b"Xing", 2, 100, 4000),
        (b"Xing", 1, 100, 4000),
        (b"Xing", 3, 0, 4000),
    ],
)
def test_what_is_not_counted_is_not_told(counts: tuple[bytes, int, int, int]) -> None:
    assert not tells_length(padded(first_frame(counts=counts)))


def test_counts_are_doubted_where_the_file_goes_on() -> None:
    assert tells_length(padded(first_frame(), size=4250))
    assert not tells_length(padded(first_frame(), size=4251))


@pytest.mark.parametrize("size", [0, 2, 9, 40, 51])
def test_a_file_that_ends_early_tells_nothing(size: int) -> None:
    assert not tells_length(first_frame()[:size])
    assert not tells_length((FOOTED_TAG + first_frame())[:size])


def test_a_tag_that_is_longer_than_the_file_hides_its_frames() -> None:
    assert not tells_length(b"ID3\4\0\0\x7f\x7f\x7f\x7f" + padded(first_frame()))
