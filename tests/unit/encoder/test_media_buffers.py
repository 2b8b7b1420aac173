"""Memory of decoded media is used again when nobody looks at it any more, and not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from chiasm.encoder.media_buffers import DecodedMedia, MediaBuffer, MediaBuffers
from chiasm.encoder.media_mappings import MAX_KEPT_BYTES, NUM_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

VIEWS: dict[str, Callable[[memoryview], object]] = {
    "memoryview": memoryview,
    "slice": lambda memory: memory[2:3],
    "array": lambda memory: np.frombuffer(memory, np.uint8),
    "part of an array": lambda memory: np.frombuffer(memory, np.uint8).reshape(2, 4)[:, :3],
    "tensor": lambda memory: torch.from_numpy(np.frombuffer(memory, np.uint8))[1:],
}


def test_freed_memory_is_taken_again() -> None:
    buffers = MediaBuffers()
    buffer = buffers.take(8)

    DecodedMedia(buffer, 8, buffers.give_back).free()

    assert buffers.take(8) is buffer
    assert buffers.take(8) is not buffer


@pytest.mark.parametrize("kind", VIEWS)
def test_memory_that_something_looks_at_is_never_taken_again(kind: str) -> None:
    buffers = MediaBuffers()
    buffer = buffers.take(8)
    media = DecodedMedia(buffer, 8, buffers.give_back)
    view = VIEWS[kind](media.memory)

    media.free()
    del view
    media.free()

    assert buffers.take(8) is not buffer


def test_freeing_twice_does_not_lend_memory_twice() -> None:
    buffers = MediaBuffers()
    media = DecodedMedia(buffers.take(8), 8, buffers.give_back)

    media.free()
    media.free()

    assert buffers.take(8) is not buffers.take(8)


def test_freed_memory_cannot_be_read() -> None:
    media = DecodedMedia(MediaBuffer(8), 8, lambda buffer: None)

    media.free()

    with pytest.raises(ValueError, match="released"):
        bytes(media.memory)


def test_media_end_where_their_bytes_end() -> None:
    assert DecodedMedia(MediaBuffer(8), 5, lambda buffer: None).memory.nbytes == 5


def test_the_smallest_buffer_that_fits_is_taken() -> None:
    buffers = MediaBuffers()
    large, small = MediaBuffer(20), MediaBuffer(10)
    buffers.give_back(large)
    buffers.give_back(small)

    assert buffers.take(5) is small
    assert buffers.take(5) is large
    assert buffers.take(5).num_bytes == 5


def test_only_the_largest_buffers_are_kept() -> None:
    buffers = MediaBuffers()
    given = [MediaBuffer(10 * (1 + index)) for index in range(NUM_KEPT + 1)]
    for buffer in reversed(given):
        buffers.give_back(buffer)

    assert [buffers.take(1) for _ in range(NUM_KEPT)] == given[1:]
    assert buffers.take(1) not in given


def test_memory_over_the_limit_is_not_kept() -> None:
    buffers = MediaBuffers()
    buffer = MediaBuffer(MAX_KEPT_BYTES + 1)

    buffers.give_back(buffer)

    assert buffers.take(1) is not buffer
