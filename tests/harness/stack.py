"""Run a whole stack as a user does, with ``chiasm up``, and look at it from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 40.0
_RESTART_TIMEOUT_S = 60.0
_POLL_PAUSE_S = 0.1
_STATE_LINE = re.compile(r"^(?P<name>[a-z]+(?:-\d+)?) +(?P<address>\S+) +(?P<state>.+)$")


class StackError(Exception):
    """The stack did not do what was asked; the text carries what it wrote."""


class Stack:
    """A running ``chiasm up``: its addresses, its processes and the lines it wrote."""

    def __init__(
        self, model: Path, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start a stack for ``model`` on free ports and wait until it is ready.

        Args:
            model: Checkpoint directory.
            flags: Further flags of ``chiasm up``.
            env: Environment variables added to ours.

        Raises:
            StackError: It was not ready within two minutes, or it ended.
        """
        # Not tmp_path: the path of the Redis socket in it has at most 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp")
        self.state_dir = Path(self._directory.name)
        self.lines: list[str] = []
        self._new_lines: SimpleQueue[str] = SimpleQueue()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "chiasm.cli.main", "up", str(model), "--port", "0"),
                *("--state-dir", str(self.state_dir), "--drain-s", "5"),
                *("--store-timeout-s", "2", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()
        try:
            self.wait_for_line(r"^ready in ", _START_TIMEOUT_S)
        except StackError:
            self.stop()
            raise

    @property
    def base_url(self) -> str:
        """URL of the gateway's REST API, without a path."""
        return self.address("gateway")

    @property
    def grpc_address(self) -> str:
        """Address of the gateway's ``ChatService``."""
        return self._flag("gateway", "--grpc-listen")

    def address(self, name: str) -> str:
        """Return the address of service ``name`` as the supervisor printed it."""
        for line in self.lines:
            found = _STATE_LINE.match(line)
            if found and found["name"] == name:
                return found["address"]
        raise StackError(f"no address of {name} in:\n" + "\n".join(self.lines))

    def command_line(self, name: str) -> list[str]:
        """Return the command line that service ``name`` was started with."""
        return _command_line(self.pid(name))

    def pid(self, name: str) -> int:
        """Return the process id of service ``name`` now."""
        if name == "redis":
            marker = str(self.state_dir / "redis.sock")
        else:
            marker = "--listen " + self.address(name).removeprefix("http://")
        for pid in self._children():
            if marker in " ".join(_command_line(pid)):
                return pid
        raise StackError(f"{name} does not run")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to service ``name`` and return its process id."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def metric(self, name: str, service: str, labels: str = "") -> float:
        """Return the sum of all samples of a metric of ``service`` whose labels hold ``labels``."""
        if service == "gateway":
            url = f"{self.base_url}/metrics"
        else:
            url = f"http://127.0.0.1:{self._flag(service, '--metrics-port')}/metrics"
        with urllib.request.urlopen(url, timeout=10.0) as response:
            text = response.read().decode()
        samples = re.findall(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for found, value in samples if labels in found)

    def wait_for_line(self, pattern: str, timeout_s: float) -> str:
        """Return the next new line that ``pattern`` finds something in.

        Raises:
            StackError: None came within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                line = self._new_lines.get(timeout=left_s)
            except Empty:
                break
            if re.search(pattern, line):
                return line
        raise StackError(
            f"no line like {pattern!r} within {timeout_s} s:\n" + "\n".join(self.lines)
        )

    def wait_until_ready(self, name: str) -> None:
        """Wait until a restarted service is ready and the gateway has seen it.

        Raises:
            StackError: It was not within a minute.
        """
        self.wait_for_line(rf"^{name} +[^| ]\S* +ready", _RESTART_TIMEOUT_S)
        deadline = time.monotonic() + _RESTART_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.base_url}/ready", timeout=5.0):
                    return
            except urllib.error.HTTPError as error:
                error.close()
            threading.Event().wait(_POLL_PAUSE_S)
        raise StackError(f"the gateway has not seen {name} again:\n" + "\n".join(self.lines))

    def stop(self) -> int:
        """Stop the stack as Ctrl-C does and return its exit status."""
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join(timeout=5.0)
        assert self._process.stdout is not None, "stdout is a pipe"
        self._process.stdout.close()
        self._directory.cleanup()
        return status

    def _flag(self, name: str, flag: str) -> str:
        parts = _command_line(self.pid(name))
        return parts[parts.index(flag) + 1]

    def _children(self) -> list[int]:
        pid = self._process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def _read_lines(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._new_lines.put(line.rstrip("\n"))


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
