"""Tests of ``chiasm.common.private_file``."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from chiasm.common.private_file import (
    PrivateFileError,
    create_private,
    make_private_folder,
    read_private,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_a_new_file_is_closed_to_others_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secret"

    create_private(path, b"content")

    assert read_private(path, 100) == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    create_private(path, b"first")

    create_private(path, b"second")

    assert read_private(path, 100) == b"first"


def test_of_many_creators_one_wins_and_nobody_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    def create_and_read(index: int) -> bytes:
        create_private(path, bytes([index]) * 4096)
        return read_private(path, 4096)

    with ThreadPoolExecutor(8) as pool:
        contents = set(pool.map(create_and_read, range(8)))

    assert len(contents) == 1
    assert len(contents.pop()) == 4096


@pytest.mark.parametrize("mode", [0o604, 0o606, 0o620, 0o777])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    create_private(path, b"content")
    path.chmod(mode)

    with pytest.raises(PrivateFileError, match="open to others; chmod it to 0600"):
        read_private(path, 100)


def test_a_missing_or_oversized_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(PrivateFileError, match="cannot be read"):
        read_private(path, 100)
    create_private(path, b"x" * 101)
    with pytest.raises(PrivateFileError, match="larger than 100 bytes"):
        read_private(path, 100)


def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PrivateFileError, match="cannot be written"):
        create_private(tmp_path / "file" / "secret", b"content")


def test_a_folder_is_made_private_with_those_above_it(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "above" / "state")

    assert (tmp_path / "above" / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o1777, 0o770, 0o755, 0o740, 0o704, 0o702])
def test_a_folder_that_is_open_to_others_is_refused_and_left_as_it_is(
    tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)

    with pytest.raises(PrivateFileError, match="is open to other users; choose another folder, or"):
        make_private_folder(tmp_path)

    assert tmp_path.stat().st_mode & 0o7777 == mode


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)

    with pytest.raises(PrivateFileError, match="belongs to another user; choose another folder"):
        make_private_folder(tmp_path)
