"""The service token's file."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from chiasm.common.service_token import (
    ServiceTokenError,
    is_same_token,
    load_or_create_service_token,
    load_service_token,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_made_token_is_private_random_and_stays(tmp_path: Path) -> None:
    first = load_or_create_service_token(tmp_path / "a" / "token")
    second = load_or_create_service_token(tmp_path / "b" / "token")

    assert len(first) == 64
    assert first != second
    assert load_or_create_service_token(tmp_path / "a" / "token") == first
    assert stat.S_IMODE((tmp_path / "a" / "token").stat().st_mode) == 0o600


def test_processes_that_start_at_once_agree_on_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with ThreadPoolExecutor(8) as executor:
        tokens = list(executor.map(load_or_create_service_token, [path] * 16))

    assert set(tokens) == {load_service_token(path)}
    assert [file.name for file in tmp_path.iterdir()] == ["token"]


def test_token_that_everyone_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    load_or_create_service_token(path)
    path.chmod(0o644)

    with pytest.raises(ServiceTokenError, match="open to others"):
        load_service_token(path)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 31, b"x" * 513, b"y" * 40 + b" " + b"y" * 40, b"\xff" * 64]
)
def test_file_without_a_usable_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(ServiceTokenError, match="must hold one line"):
        load_service_token(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceTokenError, match="absent cannot be read"):
        load_service_token(tmp_path / "absent")


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ServiceTokenError, match="cannot be written"):
        load_or_create_service_token(tmp_path / "file" / "token")


@pytest.mark.parametrize(
    ("shown", "expected"), [("a" * 32, True), ("b" * 32, False), ("", False), ("\ud800é", False)]
)
def test_tokens_are_the_same_only_if_equal(shown: str, expected: bool) -> None:
    assert is_same_token("a" * 32, shown) is expected
