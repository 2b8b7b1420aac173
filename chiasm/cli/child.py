"""Run one service as a child process: start, follow its output, stop."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cli import parent_death

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

_READ_BYTES = 1 << 16
_MAX_LINE_CHARS = 1 << 16
_KILL_WAIT_S = 5.0
# Progress bars end their states with a carriage return only.
_LINE_END = re.compile(r"\r?\n|\r(?=.)")


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How one service of a stack is run.

    Attributes:
        name: Name in lines, such as ``"encoder-0"``.
        command: Program and arguments.
        address: Where the service listens, as people write it.
        wait_ready: Returns when the service can work; it is cancelled when the time is up.
        depends_on: Names of the services that must be ready first.
        env: Environment variables beside the supervisor's own.
        endpoints: URLs of the service by what they are for: ``http``, ``grpc``, ``metrics``.
        drain_s: Seconds that running work may take to finish on stop.
    """

    name: str
    command: tuple[str, ...]
    address: str
    wait_ready: Callable[[], Awaitable[None]]
    depends_on: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    endpoints: Mapping[str, str] = field(default_factory=dict)
    drain_s: float = 10.0


def child_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return what a process with ``env`` of its own finds: this process's environment and that."""
    return {**os.environ, **env}


class Child:
    """A running process of a service, in a process group of its own.

    It gets SIGTERM when the supervisor dies, however that happens. A Ctrl-C in the terminal reaches
    only the supervisor, which then stops its children in order.
    """

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.Task[None]) -> None:
        self._process = process
        self._reader = reader
        self._is_killed = False

    @classmethod
    async def start(cls, spec: ServiceSpec, on_line: Callable[[str], None]) -> Child:
        """Start the process; ``on_line`` gets every line that it writes."""
        # NOTE: with a pipe of its own making, asyncio reports the end of a process only once every
        # grandchild has closed the pipe too; a dead service would go unnoticed.
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(Path(parent_death.__file__)), str(os.getpid())),
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=child_environment(spec.env),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        reader = asyncio.create_task(_read_lines(read_end, on_line), name=f"log {spec.name}")
        return cls(process, reader)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; negative for a signal; ``None`` while the process runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Return the exit status once the process has ended and its last lines were read."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open; its lines are not worth waiting for.
        await asyncio.wait([self._reader], timeout=1.0)
        return code

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, kill its whole group after ``grace_s`` seconds."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and whatever it started that is still there; idempotent."""
        if self._is_killed:
            return
        self._is_killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _KILL_WAIT_S)
        self._reader.cancel()
        await asyncio.wait([self._reader])


async def _read_lines(read_end: int, on_line: Callable[[str], None]) -> None:
    """Hand over every line of a pipe and close it; a line that is too long comes in pieces."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb", buffering=0)
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending = ""
    try:
        while data := await stream.read(_READ_BYTES):
            *lines, pending = _LINE_END.split(pending + decoder.decode(data))
            if len(pending) > _MAX_LINE_CHARS:
                lines, pending = [*lines, pending], ""
            for line in lines:
                _hand_over(line, on_line)
        if pending:
            _hand_over(pending, on_line)
    finally:
        transport.close()


def _hand_over(line: str, on_line: Callable[[str], None]) -> None:
    """Pass a line on; a full disk or a closed terminal must not end the reading."""
    with contextlib.suppress(OSError, ValueError):
        on_line(line)
