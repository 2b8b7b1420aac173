"""Run ``chiasm up``: prepare the state directory, then supervise the stack until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cli.console import Console
from chiasm.cli.flag_routing import FlagRouter
from chiasm.cli.listen_check import ListenError, check_can_listen
from chiasm.cli.service_log import ServiceLog
from chiasm.cli.stack import StackLayout, curl_example, served_model
from chiasm.cli.stack_files import StackFiles
from chiasm.cli.supervisor import RestartPolicy, StartError, Supervisor
from chiasm.cli.up_settings import SERVICES, UpSettings, default_state_dir, settings_model
from chiasm.common.config import ConfigError, load_settings
from chiasm.common.embedded_redis import EmbeddedRedisError
from chiasm.common.private_file import PrivateFileError, make_private_folder
from chiasm.common.secrets import StoreSecretsError
from chiasm.common.service_token import ServiceTokenError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chiasm.cli.child import ServiceSpec

_FAILED = 1
_WRONG_USE = 2


class StateDirError(Exception):
    """The state directory cannot be used; the text says why."""


class ModelPathError(Exception):
    """MODEL names no checkpoint; the text says what is missing."""


def run_up(argv: Sequence[str]) -> int:
    """Run a stack until it is told to stop.

    Args:
        argv: Command line after ``chiasm up``.

    Returns:
        Exit status: 0 after a stop by signal, 1 if a service could not be started, 2 if the
        command line or the machine is not fit for it.
    """
    try:
        models = {name: settings_model(name) for name in SERVICES}
        flags = FlagRouter(UpSettings, models).route(argv)
        settings = load_settings(UpSettings, "up", flags.own)
        state_dir = settings.state_dir or default_state_dir()
        files = StackFiles(state_dir.expanduser().absolute())
        _check_model(settings.model)
        with _hold_state_dir(files):
            files.make_secrets()
            layout = StackLayout(settings, flags, models, files, _config_file(flags.own))
            specs = layout.specs()
            for address in (specs[-1].address.removeprefix("http://"), specs[-1].endpoints["grpc"]):
                check_can_listen(address)
            return asyncio.run(_supervise(settings, files, specs))
    except (
        ConfigError,
        EmbeddedRedisError,
        ListenError,
        ModelPathError,
        ServiceTokenError,
        StateDirError,
        StoreSecretsError,
    ) as error:
        sys.stderr.write(f"chiasm up: {error}\n")
        return _WRONG_USE


async def _supervise(settings: UpSettings, files: StackFiles, specs: list[ServiceSpec]) -> int:
    console = Console(sys.stdout, sys.stderr, settings.log_level)
    console.line(f"model {settings.model}, state and logs in {files.state_dir}")
    policy = RestartPolicy(start_timeout_s=settings.start_timeout_s)
    started_at = time.monotonic()

    async def announce() -> None:
        url = specs[-1].address
        console.line(f"ready in {time.monotonic() - started_at:.1f} s at {url}; try")
        console.line(curl_example(url, await asyncio.to_thread(served_model, url)))

    with _show_endpoints(files, specs), _open_logs(files, specs) as logs:
        supervisor = Supervisor(specs, console, lambda name, text: logs[name].write(text), policy)
        _stop_on_signals(supervisor)
        try:
            await supervisor.run(announce)
        except StartError as error:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"chiasm up: {error} See {files.logs}.\n")
            return _FAILED
    return 0


@contextlib.contextmanager
def _show_endpoints(files: StackFiles, specs: list[ServiceSpec]) -> Iterator[None]:
    """Keep the file with the services' URLs while the stack runs.

    Raises:
        StateDirError: It cannot be written.
    """
    try:
        files.endpoints.write_text(
            json.dumps({spec.name: dict(spec.endpoints) for spec in specs}, indent=2) + "\n"
        )
    except OSError as error:
        raise StateDirError(f"{files.endpoints} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        # Somebody may have taken the directory away; the stack has stopped all the same.
        with contextlib.suppress(OSError):
            files.endpoints.unlink()


@contextlib.contextmanager
def _open_logs(files: StackFiles, specs: list[ServiceSpec]) -> Iterator[dict[str, ServiceLog]]:
    """Keep one log for each service open.

    Raises:
        StateDirError: One cannot be written.
    """
    with contextlib.ExitStack() as stack:
        logs: dict[str, ServiceLog] = {}
        for spec in specs:
            path = files.logs / f"{spec.name}.log"
            try:
                logs[spec.name] = stack.enter_context(contextlib.closing(ServiceLog(path)))
            except OSError as error:
                raise StateDirError(f"{path} cannot be written: {error.strerror}.") from error
        yield logs


def _stop_on_signals(supervisor: Supervisor) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup the end of the terminal is to be ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, supervisor.request_stop)


def _check_model(model: str) -> None:
    if not (Path(model) / "config.json").is_file():
        raise ModelPathError(
            f"{model} has no config.json; MODEL must be the folder of a checkpoint in the layout of"
            " the hub."
        )


@contextlib.contextmanager
def _hold_state_dir(files: StackFiles) -> Iterator[None]:
    """Make the state directory unless it is there, and keep other stacks out of it.

    Raises:
        StateDirError: It cannot be made, is open to other users, or another stack uses it.
    """
    try:
        make_private_folder(files.state_dir)
        files.logs.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PrivateFileError as error:
        raise StateDirError(f"The state directory cannot be used: {error}") from error
    except OSError as error:
        raise StateDirError(
            f"The state directory {files.state_dir} cannot be used: {error.strerror}."
        ) from error
    try:
        _take_lock(lock, files)
        yield
    finally:
        os.close(lock)


def _take_lock(lock: int, files: StackFiles) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A page of an earlier stack may have another size, and slots of processes long gone.
        files.core_page.unlink(missing_ok=True)
    except BlockingIOError:
        raise StateDirError(
            f"Another stack uses {files.state_dir}; stop it or choose another --state-dir."
        ) from None
    except OSError as error:
        raise StateDirError(
            f"The state directory {files.state_dir} cannot be used: {error.strerror}."
        ) from error


def _config_file(argv: Sequence[str]) -> str | None:
    """Return the file given by ``--config``, to hand it to the services."""
    for index, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.partition("=")[2]
        if argument == "--config" and index + 1 < len(argv):
            return argv[index + 1]
    return None
