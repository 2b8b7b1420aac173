"""Decode media in worker processes, a few at a time, and turn failures into typed errors."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from chiasm.common.errors import ChiasmError, InvalidRequestError, OverloadedError, TooLargeError
from chiasm.common.media import Modality
from chiasm.common.metrics import ENCODER_WORKER_DEATHS
from chiasm.encoder.decode_process import DecodeProcess, WorkerDiedError, WorkerTimeoutError
from chiasm.encoder.decode_wire import DecodeReply, DecodeRequest, Operation, Status
from chiasm.encoder.media_buffers import DecodedMedia, MediaBuffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.encoder.memory_file import MemoryFile


log = structlog.get_logger(__name__)

# Sizes such as 12000x9000 hold no address, though they hold "0x9000".
_UNSAFE_TEXT = re.compile(r"<.*?>|\b0x[0-9a-fA-F]+|(?:/[^\s/]+){2,}")
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Bounds of one task and of one worker.

    Attributes:
        memory_bytes: Address space of a worker.
        cpu_limit_s: CPU seconds of one task.
        video_cpu_limit_s: CPU seconds of one task about a video.
        timeout_s: Seconds of one task on the clock.
        niceness: Added to a worker's scheduling niceness.
    """

    memory_bytes: int
    cpu_limit_s: int
    timeout_s: float
    niceness: int = 10
    video_cpu_limit_s: int = 25


class DecodePool:
    """A fixed number of places for workers.

    ``_idle`` holds the places that are free: a worker, or ``None`` where one has to be started
    because the last one died. A place is borrowed for one task at a time.
    """

    def __init__(self, num_workers: int, limits: DecodeLimits) -> None:
        self._num_workers = num_workers
        self._limits = limits
        # Videos take long; where there are several places they leave one to the rest.
        self._video_places = asyncio.Semaphore(max(1, num_workers - 1))
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

    async def probe(self, modality: Modality, source: MemoryFile, task: bytes) -> bytes:
        """Read the header of a file; its contents are not decoded.

        Args:
            modality: Kind of the file.
            source: The file's bytes.
            task: What the decoder of this kind is told.

        Returns:
            What the decoder of this kind answers.

        Raises:
            InvalidRequestError: It is no file of an accepted format.
            TooLargeError: It announces more than allowed.
            OverloadedError: No worker could be had in time.
        """
        operation = Operation[f"PROBE_{modality.name}"]
        return await self._probe(modality, operation, task, source)

    async def decode(
        self, modality: Modality, source: MemoryFile, task: bytes, num_bytes: int
    ) -> DecodedMedia:
        """Decode a file that was probed; who has read the media frees them.

        Args:
            modality: Kind of the file.
            source: The file's bytes.
            task: What the decoder of this kind is told.
            num_bytes: Bytes that the decoded media take; the decoder must fill them all.

        Raises:
            InvalidRequestError: The file is broken or takes too much time or memory.
            TooLargeError: It has more than its header announced.
            OverloadedError: No worker could be had in time.
        """
        operation = Operation[f"DECODE_{modality.name}"]
        return await self._decode(modality, operation, task, source, num_bytes)

    async def probe_tensor(self, modality: Modality, source: MemoryFile, task: bytes) -> bytes:
        """Read the header of a file with a ready-made embedding; see ``probe``."""
        return await self._probe(modality, Operation.PROBE_TENSOR, task, source)

    async def decode_tensor(
        self, modality: Modality, source: MemoryFile, task: bytes, num_bytes: int
    ) -> memoryview:
        """Copy the elements of an embedding out of a file that was probed; see ``decode``."""
        operation = Operation.DECODE_TENSOR
        return (await self._decode(modality, operation, task, source, num_bytes)).memory

    async def _probe(
        self, modality: Modality, operation: Operation, task: bytes, source: MemoryFile
    ) -> bytes:
        return (await self._call(modality, _Task(operation, task, source))).reply.body

    async def _decode(
        self,
        modality: Modality,
        operation: Operation,
        task: bytes,
        source: MemoryFile,
        num_bytes: int,
    ) -> DecodedMedia:
        answer = await self._call(modality, _Task(operation, task, source, num_bytes))
        assert answer.media is not None, "there is memory for decoded media"
        return answer.media

    async def _call(self, modality: Modality, task: _Task) -> _Answer:
        is_video = modality is Modality.VIDEO
        cpu_limit_s = self._limits.video_cpu_limit_s if is_video else self._limits.cpu_limit_s
        request = DecodeRequest(task.operation, cpu_limit_s, task.body)
        async with self._video_places if is_video else nullcontext():
            answer = await self._run_twice(modality, request, task)
        try:
            _check(modality, answer.reply)
        except ChiasmError:
            answer.free()
            raise
        return answer

    async def _run_twice(self, modality: Modality, request: DecodeRequest, task: _Task) -> _Answer:
        try:
            try:
                return await self._run(request, task)
            except WorkerDiedError as error:
                if error.is_cpu_limit:
                    raise
                # It may have died of something else than this file; a second death is the file's.
                return await self._run(request, task)
        except WorkerDiedError as error:
            detail = "takes too long to decode" if error.is_cpu_limit else "cannot be decoded"
            raise invalid_media(modality, f"the file {detail}") from None
        except WorkerTimeoutError:
            raise OverloadedError(
                "No decoder was free in time; please try again.", retry_after_s=_RETRY_AFTER_S
            ) from None

    async def _run(self, request: DecodeRequest, task: _Task) -> _Answer:
        """Call a worker from a thread; a cancelled call ends the worker, then the thread."""
        loop = asyncio.get_running_loop()
        async with self._borrow() as process:
            buffer = _memory_for(task, process)
            fds = [task.source.fd, *([] if buffer is None else [buffer.fd])]
            call = loop.run_in_executor(
                self._threads, process.call, request, fds, self._limits.timeout_s
            )
            try:
                reply = await asyncio.shield(call)
            except asyncio.CancelledError:
                process.kill()
                await asyncio.wait([call])
                call.exception()
                raise
            if buffer is None:
                return _Answer(reply)
            return _Answer(reply, DecodedMedia(buffer, task.num_bytes, process.buffers.give_back))

    @asynccontextmanager
    async def _borrow(self) -> AsyncIterator[DecodeProcess]:
        process = await self._idle.get()
        is_usable = False
        try:
            # No file is to blame for a worker that has ended while it was idle.
            if process is not None and process.has_ended:
                ENCODER_WORKER_DEATHS.labels("idle").inc()
                self._drop(process)
                process = None
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
                self._drop(process)

    def _drop(self, process: DecodeProcess) -> None:
        log.info("decode_worker_ended", pid=process.pid)
        self._processes.discard(process)
        process.close()

    def _spawn(self) -> DecodeProcess:
        process = DecodeProcess(
            memory_bytes=self._limits.memory_bytes, niceness=self._limits.niceness
        )
        self._processes.add(process)
        return process


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker is asked; ``num_bytes`` of decoded media come of it, 0 from a probe."""

    operation: Operation
    body: bytes
    source: MemoryFile
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """A worker's reply, and what it has decoded."""

    reply: DecodeReply
    media: DecodedMedia | None = None

    def free(self) -> None:
        if self.media is not None:
            self.media.free()


def invalid_media(modality: Modality, detail: str) -> InvalidRequestError:
    """Return the error for a file that cannot be processed."""
    return InvalidRequestError(f"Failed to load {modality.value}: {detail}", reason="INVALID_MEDIA")


def make_safe(message: str) -> str:
    """Return a decoder's words without addresses, paths, reprs or control characters."""
    text = "".join(char if char.isprintable() else " " for char in message)
    return _UNSAFE_TEXT.sub("", text).strip() or "the file cannot be decoded"


def _memory_for(task: _Task, process: DecodeProcess) -> MediaBuffer | None:
    if task.operation.is_probe:
        return None
    if task.operation is Operation.DECODE_IMAGE:
        return process.buffers.take(task.num_bytes)
    # What its decoder leaves unwritten must be zero.
    return MediaBuffer(task.num_bytes)


def _check(modality: Modality, reply: DecodeReply) -> None:
    if reply.status is Status.INVALID:
        raise invalid_media(modality, make_safe(reply.message))
    if reply.status is Status.OUT_OF_MEMORY:
        raise invalid_media(modality, "the file needs too much memory to decode")
    if reply.status is Status.TOO_LARGE:
        raise TooLargeError(make_safe(reply.message))
