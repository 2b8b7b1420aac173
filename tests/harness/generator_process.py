"""Run the generator as its own process and wait until it serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from chiasm.cli.thread_env import THREAD_ENV
from chiasm.common.secrets import StoreSecrets
from chiasm.common.service_token import load_or_create_service_token

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_START_TIMEOUT_S = 50.0
_STOP_TIMEOUT_S = 20.0


class GeneratorProcess:
    """``python -m chiasm.generator`` on a free port, with its own token, secret and step trace."""

    def __init__(
        self,
        model: Path,
        state_dir: Path,
        redis_url: str,
        flags: Sequence[str] = (),
        num_threads: int = 1,
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            model: Checkpoint directory.
            state_dir: Empty directory for its files.
            redis_url: Redis that keeps embeddings; empty for none.
            flags: Further flags.
            num_threads: Threads of its forwards.

        Raises:
            TimeoutError: It was not ready in time, or it ended; the text carries its log.
        """
        token_file, secret_file = state_dir / "token", state_dir / "secret"
        self.token = load_or_create_service_token(token_file)
        self.secrets = StoreSecrets.load_or_create(secret_file)
        self.trace = state_dir / "trace.jsonl"
        self.port = 0
        self.log: list[str] = []
        self._is_ready = threading.Event()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "chiasm.generator", "--model", str(model)),
                *("--service-token-file", str(token_file)),
                *("--store-secret-file", str(secret_file), "--redis-url", redis_url),
                *("--step-trace", str(self.trace), "--cores", str(num_threads)),
                *("--store-timeout-s", "2", *flags),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), **THREAD_ENV},
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if not self._is_ready.wait(_START_TIMEOUT_S) or not self.port:
            self.stop()
            raise TimeoutError("The generator did not become ready:\n" + "".join(self.log))

    @property
    def address(self) -> str:
        """Address of its gRPC port."""
        return f"127.0.0.1:{self.port}"

    def step_sizes(self) -> list[int]:
        """Return how many sequences each step had."""
        lines = self.trace.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["num_sequences"] for line in lines]

    def stop(self) -> int:
        """Ask it to end and return its exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            if self._process.stderr is not None:
                self._process.stderr.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None, "it was asked for"
        for line in self._process.stderr:
            self.log.append(line)
            if '"generator_ready"' in line:
                self.port = json.loads(line)["port"]
                self._is_ready.set()
        self._is_ready.set()
