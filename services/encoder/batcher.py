"""Feed the tower: one device thread, and as a batch whatever waits while it is busy."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from chiasm.common.errors import UnavailableError
from chiasm.common.metrics import ENCODER_BATCH_ITEMS, ENCODER_FORWARD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from chiasm.common.compute_threads import ComputeThreads
    from chiasm.encoder.preprocess import TowerInputs


class TowerLike(Protocol):
    """What the batcher needs of a tower."""

    def encode(self, items: Sequence[TowerInputs]) -> list[torch.Tensor]:
        """Encode items in one forward; called from one thread."""
        ...


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one forward: items, and pixels unless a single item has more."""

    max_items: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class TowerRows:
    """The embedding of an item and the seconds that its share of a forward took.

    Attributes:
        rows: The embedding. [num_rows, hidden_size], on the CPU.
        work_s: Seconds of the forward, shared out by pixels; no wait is in it.
    """

    rows: torch.Tensor
    work_s: float


@dataclass(frozen=True, slots=True)
class _Pending:
    inputs: TowerInputs
    result: asyncio.Future[TowerRows]


class EncodeBatcher:
    """A queue of items before one tower.

    There is no timer: an idle tower takes the first item at once, a busy one finds a batch; a batch
    ends before an item that cannot join it, such as one of another modality. Items whose callers
    have gone leave the queue unseen. When a batch fails, its items run one by one, so that a bad
    item fails alone. The callers bound the queue (``Admission``).
    """

    def __init__(self, tower: TowerLike, threads: ComputeThreads, limits: BatchLimits) -> None:
        self._tower = tower
        self._threads = threads
        self._limits = limits
        self._queue: deque[_Pending] = deque()
        self._has_items = asyncio.Event()
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="tower")
        self._is_stopping = False
        self._feeder: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to feed the tower."""
        self._feeder = asyncio.create_task(self._feed(), name="tower-feeder")

    async def stop(self) -> None:
        """Let the forward in progress end and fail what waits with ``UnavailableError``."""
        self._is_stopping = True
        self._has_items.set()
        if self._feeder is not None:
            await self._feeder
        for pending in self._queue:
            if not pending.result.done():
                pending.result.set_exception(_stopping())
        self._queue.clear()
        self._device_thread.shutdown(wait=False)

    async def submit(self, inputs: TowerInputs) -> TowerRows:
        """Return the rows of an item once the tower has computed them.

        Cancelling takes the item out of the queue; a forward that has begun runs to its end.

        Raises:
            UnavailableError: The encoder stops.
        """
        if self._is_stopping:
            raise _stopping()
        pending = _Pending(inputs, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._has_items.set()
        return await pending.result

    async def _feed(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_stopping:
            batch = self._take_batch()
            if not batch:
                await self._has_items.wait()
                self._has_items.clear()
                continue
            results: list[TowerRows | Exception]
            try:
                results = await loop.run_in_executor(self._device_thread, self._run, batch)
            except Exception as error:
                # Whatever it is, no caller may wait forever.
                results = [error] * len(batch)
            for pending, result in zip(batch, results, strict=True):
                if pending.result.done():
                    continue
                if isinstance(result, Exception):
                    pending.result.set_exception(result)
                else:
                    pending.result.set_result(result)

    def _take_batch(self) -> list[_Pending]:
        batch: list[_Pending] = []
        num_pixels = 0
        while self._queue and len(batch) < self._limits.max_items:
            pending = self._queue[0]
            if pending.result.done():
                self._queue.popleft()
                continue
            num_pixels += pending.inputs.num_pixels
            if batch and (
                num_pixels > self._limits.max_pixels or not pending.inputs.joins(batch[0].inputs)
            ):
                break
            batch.append(self._queue.popleft())
        return batch

    def _run(self, batch: Sequence[_Pending]) -> list[TowerRows | Exception]:
        self._threads.begin()
        try:
            return self._encode([pending.inputs for pending in batch])
        finally:
            self._threads.rest()

    def _encode(self, items: Sequence[TowerInputs]) -> list[TowerRows | Exception]:
        ENCODER_BATCH_ITEMS.observe(len(items))
        try:
            started = time.monotonic()
            with ENCODER_FORWARD_SECONDS.time():
                results = self._tower.encode(items)
            pixel_s = (time.monotonic() - started) / sum(item.num_pixels for item in items)
            return [
                TowerRows(rows, pixel_s * item.num_pixels)
                for item, rows in zip(items, results, strict=True)
            ]
        except Exception as error:
            # It is given to the item's caller, whose call ends with it.
            if len(items) == 1:
                return [error]
        return [result for item in items for result in self._encode([item])]


def _stopping() -> UnavailableError:
    return UnavailableError("The encoder is shutting down.", reason="DRAINING")
