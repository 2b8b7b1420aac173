"""A worker finds memory files that come again where they were, and keeps few of them."""

from __future__ import annotations

import os

from chiasm.encoder.media_mappings import MAX_KEPT_BYTES, NUM_KEPT, MediaMappings
from chiasm.encoder.memory_file import MemoryFile


def test_a_file_that_comes_again_under_another_descriptor_is_not_mapped_twice() -> None:
    mappings, memory = MediaMappings(), MemoryFile(8)
    first = mappings.of(memory.fd)
    fd = os.dup(memory.fd)

    assert mappings.of(fd) is first
    os.close(fd)


def test_files_are_not_mistaken_for_each_other() -> None:
    mappings = MediaMappings()
    files = [MemoryFile(1) for _ in range(NUM_KEPT + 1)]
    for value, file in enumerate(files):
        mappings.of(file.fd)[0] = value

    assert [mappings.of(file.fd)[0] for file in files] == list(range(len(files)))


def test_only_the_newest_files_are_kept() -> None:
    mappings = MediaMappings()
    files = [MemoryFile(1) for _ in range(NUM_KEPT + 1)]
    mapped = [mappings.of(file.fd) for file in files]

    assert mappings.of(files[-1].fd) is mapped[-1]
    assert mappings.of(files[0].fd) is not mapped[0]


def test_files_over_the_limit_are_not_kept() -> None:
    mappings, memory = MediaMappings(), MemoryFile(MAX_KEPT_BYTES + 1)

    assert mappings.of(memory.fd) is not mappings.of(memory.fd)
