"""Own one decode worker process: start it, give it tasks, end it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import chiasm
from chiasm.encoder.decode_wire import REPLY_BYTES, DecodeReply, DecodeRequest, WireError
from chiasm.encoder.media_buffers import MediaBuffers

if TYPE_CHECKING:
    from collections.abc import Sequence

_IMPORT_ROOT = str(Path(chiasm.__file__).resolve().parent.parent)
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from chiasm.encoder.decode_worker import main; main()"
)
# Pieces of 16 MiB that Pillow keeps for the next picture, so that it need not touch new pages.
_NUM_KEPT_BLOCKS = 4
_EXIT_TIMEOUT_S = 5.0


class WorkerDiedError(Exception):
    """The worker ended before it answered.

    Attributes:
        is_cpu_limit: Whether the kernel ended it because the task took too many CPU seconds.
    """

    def __init__(self, *, is_cpu_limit: bool) -> None:
        super().__init__("decode worker died")
        self.is_cpu_limit = is_cpu_limit

    @property
    def reason(self) -> str:
        """Word for the metric."""
        return "cpu_limit" if self.is_cpu_limit else "crash"


class WorkerTimeoutError(Exception):
    """The worker did not answer in time; it was killed."""

    reason = "timeout"


class DecodeProcess:
    """A worker process and the socket to it. Not thread-safe, except for ``kill``.

    After ``WorkerDiedError``, ``WorkerTimeoutError`` or ``kill`` the object is of no more use.
    """

    def __init__(self, *, memory_bytes: int, niceness: int) -> None:
        """Start a worker.

        Args:
            memory_bytes: Address space it may take.
            niceness: Added to the scheduling niceness of this process.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        self._buffers = MediaBuffers()
        with theirs:
            arguments = [str(theirs.fileno()), str(memory_bytes), str(niceness)]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, _IMPORT_ROOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # NOTE: numpy's OpenBLAS takes address space for every core of a large host.
                env={"OPENBLAS_NUM_THREADS": "1", "PILLOW_BLOCKS_MAX": str(_NUM_KEPT_BLOCKS)},
            )

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def buffers(self) -> MediaBuffers:
        """Memory that this worker, and no other, decodes into."""
        return self._buffers

    @property
    def has_ended(self) -> bool:
        """Whether the worker runs no more."""
        return self._process.poll() is not None

    def call(self, request: DecodeRequest, fds: Sequence[int], timeout_s: float) -> DecodeReply:
        """Give the worker a task and wait for its answer.

        Args:
            request: The task.
            fds: The source's memory file, then that of the decoded media.
            timeout_s: Seconds after which the worker is killed.

        Raises:
            WorkerDiedError: It crashed, was killed, or answered nonsense.
            WorkerTimeoutError: It was too slow.
        """
        self._channel.settimeout(timeout_s)
        try:
            socket.send_fds(self._channel, [request.pack()], list(fds))
            answer = self._channel.recv(REPLY_BYTES)
            if answer:
                return DecodeReply.unpack(answer)
        except TimeoutError:
            self.kill()
            raise WorkerTimeoutError from None
        except (OSError, WireError):
            self.kill()
        raise WorkerDiedError(is_cpu_limit=self._wait() == -signal.SIGXCPU)

    def kill(self) -> None:
        """End the worker at once; a ``call`` in another thread raises."""
        self._process.kill()

    def close(self) -> None:
        """End the worker and free what it took."""
        self.kill()
        self._wait()
        self._channel.close()

    def _wait(self) -> int:
        try:
            return self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()
