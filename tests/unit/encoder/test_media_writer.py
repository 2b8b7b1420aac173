"""Decoded media are written into their memory file, whole and never beyond its end."""

from __future__ import annotations

import pytest

from chiasm.encoder.media_mappings import MediaMappings
from chiasm.encoder.media_writer import MediaWriter
from chiasm.encoder.memory_file import MemoryFile


def test_pieces_of_any_kind_stand_one_after_the_other() -> None:
    memory = MemoryFile(6)
    media = MediaWriter(memory.fd, MediaMappings())

    media.write(b"ab")
    media.write(memoryview(bytearray(b"cdef")).cast("H"))

    assert memory.map()[:] == b"abcdef"
    assert media.num_left == 0


def test_what_a_dead_worker_wrote_is_written_over() -> None:
    memory = MemoryFile(4)
    MediaWriter(memory.fd, MediaMappings()).write(b"xx")

    MediaWriter(memory.fd, MediaMappings()).write(b"abcd")

    assert memory.map()[:] == b"abcd"


def test_more_than_was_announced_is_refused() -> None:
    memory = MemoryFile(3)
    media = MediaWriter(memory.fd, MediaMappings())
    media.write(b"ab")

    with pytest.raises(ValueError, match="more of it than its header tells"):
        media.write(b"cd")

    assert memory.map()[:] == b"ab\0"
