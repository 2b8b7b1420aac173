"""``chiasm up`` before anything is started: wrong use and the state directory."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from chiasm.cli.console import Console
from chiasm.cli.stack_files import StackFiles
from chiasm.cli.supervisor import StartError, Supervisor
from chiasm.cli.up import _hold_state_dir, _stop_on_signals, run_up

MODEL = "models/demo"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "--model is required"),
        (["m", "--encodres", "2"], "did you mean --encoders?"),
        (["m", "--encoders", "many"], "--encoders: "),
        (["m", "--port", "65535"], "--port 65535 has no port behind it for gRPC"),
        (["m", "--port", "8303", "--grpc-port", "8303"], "are both 8303; they must differ"),
        (["m", "--grpc-port", "8000"], "are both 8000; they must differ"),
        (["m", "--redis-url", "redis+cluster://h"], "Cluster and Sentinel are not supported yet"),
        ([MODEL, "--trust-remote-code"], "is refused"),
        ([MODEL, "--dtype", "int3"], "--dtype: "),
        (["m", "--config", "/absent.toml"], "cannot be read"),
        (["m"], "m has no config.json"),
        ([MODEL, "--state-dir", "/dev/null/x"], "cannot be used"),
        ([MODEL, "--state-dir", "/tmp/" + "x" * 120], "choose a shorter state directory"),
    ],
)
def test_wrong_use_ends_with_status_2_and_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = [] if "--state-dir" in argv or not argv else ["--state-dir", str(tmp_path)]

    assert run_up([*argv, *extra]) == 2

    error = capsys.readouterr().err
    assert error.startswith("chiasm up: ")
    assert error.count("\n") == 1
    assert sentence in error


def test_state_directory_of_a_running_stack_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lock = os.open(tmp_path / "up.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    assert run_up([MODEL, "--state-dir", str(tmp_path)]) == 2

    os.close(lock)
    assert "Another stack uses" in capsys.readouterr().err


def test_state_directory_that_others_share_is_refused_and_left_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o1777)

    assert run_up([MODEL, "--state-dir", str(tmp_path)]) == 2

    assert "is open to other users; choose another folder" in capsys.readouterr().err
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    assert not list(tmp_path.iterdir())


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_up(["--help"])

    assert caught.value.code == 0
    assert "--encoders" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_port_that_is_taken_is_told_before_anything_starts(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as state_dir,
        socket.create_server(("", 0)) as taken,
    ):
        port = taken.getsockname()[1]
        flags = ["--port", "0", "--grpc-port", "0", flag, str(port), "--state-dir", state_dir]

        assert run_up([MODEL, *flags]) == 2

    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["endpoints.json", "logs/gateway.log"])
def test_file_of_the_stack_that_cannot_be_written_is_told_before_anything_starts(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as state_dir:
        path = Path(state_dir) / name
        path.mkdir(parents=True)

        assert run_up([MODEL, "--port", "0", "--state-dir", state_dir]) == 2

        assert not (Path(state_dir) / "redis.sock").exists()
    error = capsys.readouterr().err
    assert error == f"chiasm up: {path} cannot be written: Is a directory.\n"


@pytest.mark.parametrize("error", [None, StartError("gateway did not start.")])
def test_endpoints_are_told_while_the_stack_runs_and_no_longer(
    error: StartError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as state_dir:
        endpoints = Path(state_dir) / "endpoints.json"
        told: list[str] = []

        async def run(*_: object) -> None:
            told.extend(json.loads(endpoints.read_text()))
            if error:
                raise error

        monkeypatch.setattr(Supervisor, "run", run)

        assert run_up([MODEL, "--port", "0", "--state-dir", state_dir]) == (1 if error else 0)

        assert told == ["redis", "encoder-0", "generator", "gateway"]
        assert not endpoints.exists()


def test_core_page_of_an_earlier_stack_is_removed(tmp_path: Path) -> None:
    files = StackFiles(tmp_path)
    files.core_page.write_bytes(b"CHIASMC1")

    with _hold_state_dir(files):
        assert not files.core_page.exists()


def test_lack_of_processes_is_not_taken_for_another_stack(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), _hold_state_dir(StackFiles(tmp_path)):
        raise BlockingIOError(11, "Resource temporarily unavailable")


async def test_closed_terminal_stops_the_stack_except_under_nohup() -> None:
    console = Console(io.StringIO(), io.StringIO(), "info")
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _stop_on_signals(Supervisor([], console, lambda _name, _text: None))
        assert not loop.remove_signal_handler(signal.SIGHUP)

        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        supervisor = Supervisor([], console, lambda _name, _text: None)
        _stop_on_signals(supervisor)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            await supervisor.run(_do_nothing)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)


async def _do_nothing() -> None:
    """Take the news that all is ready."""
