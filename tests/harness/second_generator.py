"""A second generator beside that of a running stack."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chiasm.cli.stack import _find_free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.stack import Stack

_STOP_TIMEOUT_S = 20.0


@contextmanager
def second_generator(stack: Stack) -> Iterator[str]:
    """Start another generator with the secrets and the Redis of ``stack``; yield its address.

    It may not be ready yet; a gateway that is given the address waits for it.
    """
    address = f"127.0.0.1:{_find_free_port()}"
    command = stack.command_line("generator")
    for flag, value in (("--listen", address), ("--metrics-port", str(_find_free_port()))):
        command[command.index(flag) + 1] = value
    env = {**os.environ, "CHIASM_GENERATOR_REDIS_URL": f"unix://{stack.state_dir}/redis.sock"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
