"""Feed the tower: one device thread, and as a batch whatever waits while it is busy."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from chiasm.common.errors import UnavailableError
from chiasm.common.metrics import ENCODER_BATCH_ITEMS, ENCODER_FORWARD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.cores import Cores
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
class _Pending:
    inputs: TowerInputs
    result: asyncio.Future[torch.Tensor]


class EncodeBatcher:
    """A queue of items before one tower.

    There is no timer: an idle tower takes the first item at once, a busy one finds a batch. Items
    whose callers have gone leave the queue unseen. When a batch fails, its items run one by one,
    so that a bad item fails alone. The callers bound the queue (``Admission``).
    """

    def __init__(self, tower: TowerLike, cores: Cores, limits: BatchLimits) -> None:
        self._tower = tower
        self._cores = cores
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

    async def submit(self, inputs: TowerInputs) -> torch.Tensor:
        """Return the rows of an item once the tower has computed them.

        Cancelling takes the item out of the queue; a forward that has begun runs to its end.

        Returns:
            The item's embedding. [num_rows, hidden_size], on the CPU.

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
            results: list[torch.Tensor | Exception]
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
            if batch and num_pixels > self._limits.max_pixels:
                break
            batch.append(self._queue.popleft())
        return batch

    def _run(self, batch: Sequence[_Pending]) -> list[torch.Tensor | Exception]:
        self._cores.set_busy(True)
        try:
            torch.set_num_threads(self._cores.available_threads())
            return self._encode([pending.inputs for pending in batch])
        finally:
            self._cores.set_busy(False)

    def _encode(self, items: Sequence[TowerInputs]) -> list[torch.Tensor | Exception]:
        ENCODER_BATCH_ITEMS.observe(len(items))
        try:
            with ENCODER_FORWARD_SECONDS.time():
                return list(self._tower.encode(items))
        except Exception as error:
            # It is given to the item's caller, whose call ends with it.
            if len(items) == 1:
                return [error]
        return [result for item in items for result in self._encode([item])]


def _stopping() -> UnavailableError:
    return UnavailableError("The encoder is shutting down.", reason="DRAINING")
