"""Decode pictures in worker processes, a few at a time, and turn failures into typed errors."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from chiasm.common.errors import InvalidRequestError, OverloadedError, TooLargeError
from chiasm.common.metrics import ENCODER_WORKER_DEATHS
from chiasm.encoder.decode_process import DecodeProcess, WorkerDiedError, WorkerTimeoutError
from chiasm.encoder.decode_wire import (
    MAX_SIDE,
    DecodeReply,
    DecodeRequest,
    Operation,
    Status,
)
from chiasm.encoder.pixels import ImageHeader, MemoryFile, Pixels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

log = structlog.get_logger(__name__)

_UNSAFE_TEXT = re.compile(r"<.*?>|0x[0-9a-fA-F]+|(?:/[^\s/]+){2,}")
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Bounds of one task and of one worker.

    Attributes:
        max_pixels: Most pixels of a picture, by its header.
        memory_bytes: Address space of a worker.
        cpu_limit_s: CPU seconds of one task.
        timeout_s: Seconds of one task on the clock.
        niceness: Added to a worker's scheduling niceness.
    """

    max_pixels: int
    memory_bytes: int
    cpu_limit_s: int
    timeout_s: float
    niceness: int = 10


class DecodePool:
    """A fixed number of places for workers.

    ``_idle`` holds the places that are free: a worker, or ``None`` where one has to be started
    because the last one died. A place is borrowed for one task at a time.
    """

    def __init__(self, num_workers: int, limits: DecodeLimits) -> None:
        self._num_workers = num_workers
        self._limits = limits
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._idle: asyncio.Queue[DecodeProcess | None] = asyncio.Queue()
        self._processes: set[DecodeProcess] = set()

    def start(self) -> None:
        """Start the workers; they import their libraries in the background."""
        for _ in range(self._num_workers):
            self._idle.put_nowait(self._spawn())

    def stop(self) -> None:
        """End the workers; tasks that still run raise."""
        for process in self._processes:
            process.close()
        self._processes.clear()
        self._threads.shutdown()

    async def probe(self, source: MemoryFile) -> ImageHeader:
        """Read the header of a picture; its pixels are not touched.

        Raises:
            InvalidRequestError: It is not a picture of an accepted format.
            TooLargeError: It has too many pixels.
            OverloadedError: No worker could be had in time.
        """
        reply = await self._call(self._request(Operation.PROBE), (source.fd,))
        header = ImageHeader(reply.width, reply.height)
        if not header.width or not header.height or header.num_pixels > self._limits.max_pixels:
            raise _invalid("the size of the picture is out of range")
        return header

    async def decode(self, source: MemoryFile, header: ImageHeader, background_rgb: int) -> Pixels:
        """Decode a picture that was probed.

        Args:
            source: The file's bytes.
            header: What ``probe`` told.
            background_rgb: Colour behind transparent pixels, 0xRRGGBB.

        Raises:
            InvalidRequestError: The file is broken or takes too much time or memory.
            OverloadedError: No worker could be had in time.
        """
        request = self._request(Operation.DECODE, header, background_rgb)
        pixels = MemoryFile(header.num_bytes)
        await self._call(request, (source.fd, pixels.fd))
        return Pixels(header, pixels.map())

    def _request(
        self,
        operation: Operation,
        header: ImageHeader | None = None,
        background_rgb: int = 0,
    ) -> DecodeRequest:
        return DecodeRequest(
            operation=operation,
            background_rgb=background_rgb,
            width=header.width if header else 0,
            height=header.height if header else 0,
            cpu_limit_s=self._limits.cpu_limit_s,
            max_pixels=self._limits.max_pixels,
        )

    async def _call(self, request: DecodeRequest, fds: Sequence[int]) -> DecodeReply:
        try:
            try:
                reply = await self._run(request, fds)
            except WorkerDiedError as error:
                if error.is_cpu_limit:
                    raise
                # It may have died of something else than this file; a second death is the file's.
                reply = await self._run(request, fds)
        except WorkerDiedError as error:
            detail = "takes too long to decode" if error.is_cpu_limit else "cannot be decoded"
            raise _invalid(f"the file {detail}") from None
        except WorkerTimeoutError:
            raise OverloadedError(
                "No decoder was free in time; please try again.", retry_after_s=_RETRY_AFTER_S
            ) from None
        _check(reply, self._limits.max_pixels)
        return reply

    async def _run(self, request: DecodeRequest, fds: Sequence[int]) -> DecodeReply:
        """Call a worker from a thread; a cancelled call ends the worker, then the thread."""
        loop = asyncio.get_running_loop()
        async with self._borrow() as process:
            task = loop.run_in_executor(
                self._threads, process.call, request, fds, self._limits.timeout_s
            )
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                process.kill()
                await asyncio.wait([task])
                task.exception()
                raise

    @asynccontextmanager
    async def _borrow(self) -> AsyncIterator[DecodeProcess]:
        process = await self._idle.get()
        is_usable = False
        try:
            if process is None:
                process = self._spawn()
            yield process
            is_usable = True
        except (WorkerDiedError, WorkerTimeoutError) as error:
            ENCODER_WORKER_DEATHS.labels(error.reason).inc()
            raise
        finally:
            self._idle.put_nowait(process if is_usable else None)
            if process is not None and not is_usable:
                log.info("decode_worker_ended", pid=process.pid)
                self._processes.discard(process)
                process.close()

    def _spawn(self) -> DecodeProcess:
        process = DecodeProcess(
            memory_bytes=self._limits.memory_bytes, niceness=self._limits.niceness
        )
        self._processes.add(process)
        return process


def _check(reply: DecodeReply, max_pixels: int) -> None:
    if reply.status is Status.INVALID:
        raise _invalid(make_safe(reply.message))
    if reply.status is Status.OUT_OF_MEMORY:
        raise _invalid("the file needs too much memory to decode")
    if reply.status is Status.TOO_LARGE:
        raise TooLargeError(_too_large(reply.width, reply.height, max_pixels))


def _too_large(width: int, height: int, max_pixels: int) -> str:
    if max(width, height) > MAX_SIDE:
        return f"Image dimensions {width}x{height} exceed the maximum of {MAX_SIDE} pixels a side."
    size = f" {width}x{height} ({width * height} pixels)" if width else ""
    return f"Image dimensions{size} exceed the maximum of {max_pixels} pixels."


def _invalid(detail: str) -> InvalidRequestError:
    return InvalidRequestError(f"Failed to load image: {detail}", reason="INVALID_MEDIA")


def make_safe(message: str) -> str:
    """Return a decoder's words without addresses, paths, reprs or control characters."""
    text = "".join(char if char.isprintable() else " " for char in message)
    return _UNSAFE_TEXT.sub("", text).strip() or "the file cannot be decoded"
