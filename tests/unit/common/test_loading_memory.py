"""Tests of ``chiasm.common.loading_memory``."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest

from chiasm.common.loading_memory import give_back_loading_memory
from tests.harness.mapped_pages import num_mapped_bytes

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = bytes(range(256)) * 256


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a directory in the layout of a hub's cache: the file is a link to where it lies."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(CONTENT)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0a1b")
    return tmp_path / "snapshot"


def map_privately(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def test_pages_that_were_read_leave_and_come_back(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    mapping = map_privately(weights)
    assert bytes(mapping) == CONTENT
    assert num_mapped_bytes(weights) == len(CONTENT)

    give_back_loading_memory(checkpoint)

    assert num_mapped_bytes(weights) == 0
    assert bytes(mapping) == CONTENT


def test_a_mapping_that_was_written_to_is_left_alone(checkpoint: Path) -> None:
    mapping = map_privately(checkpoint / "model.safetensors")
    mapping[:1] = b"x"

    give_back_loading_memory(checkpoint)

    assert bytes(mapping) == b"x" + CONTENT[1:]


def test_other_files_are_left_alone(checkpoint: Path) -> None:
    other = checkpoint / "tokenizer.json"
    other.write_bytes(CONTENT)
    mapping = map_privately(other)
    assert bytes(mapping) == CONTENT

    give_back_loading_memory(checkpoint)

    assert num_mapped_bytes(other) == len(CONTENT)
