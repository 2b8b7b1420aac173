"""A second gateway in front of a running stack."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chiasm.cli.stack import _find_free_port
from tests.harness.stack import StackError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.harness.stack import Stack

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_POLL_PAUSE_S = 0.1


@contextmanager
def second_gateway(stack: Stack, flags: Sequence[str] = ()) -> Iterator[str]:
    """Start another gateway for the services of ``stack``; yield its URL, stop it at the end.

    Args:
        stack: A stack with a Redis of its own.
        flags: Further flags of the gateway.

    Raises:
        StackError: It was not ready within a minute.
    """
    url = f"http://127.0.0.1:{_find_free_port()}"
    command = stack.command_line("gateway")
    for flag, address in (
        ("--listen", url.removeprefix("http://")),
        ("--grpc-listen", f"127.0.0.1:{_find_free_port()}"),
    ):
        command[command.index(flag) + 1] = address
    env = {**os.environ, "CHIASM_GATEWAY_REDIS_URL": f"unix://{stack.state_dir}/redis.sock"}
    with subprocess.Popen([*command, *flags], env=env, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_ready(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5.0):
                return
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        threading.Event().wait(_POLL_PAUSE_S)
    raise StackError("the second gateway did not become ready")
