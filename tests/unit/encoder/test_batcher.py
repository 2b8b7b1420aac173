"""Items are batched while the tower is busy, fail alone and leave when their callers go."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import torch

from chiasm.common.compute_threads import ComputeThreads
from chiasm.common.errors import UnavailableError
from chiasm.common.media import Modality
from chiasm.encoder.batcher import BatchLimits, EncodeBatcher
from chiasm.encoder.preprocess import TowerInputs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class FakeTower:
    """Answers with the item's number; item 13 is poison; holds every forward until let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def encode(self, items: Sequence[TowerInputs]) -> list[torch.Tensor]:
        """Return the items' numbers once let go."""
        numbers = [int(item.tensors["number"][0, 0]) for item in items]
        self.batches.append(numbers)
        self.started.release()
        self.gate.acquire(timeout=10)
        if 13 in numbers:
            raise ValueError("poison")
        return [torch.tensor([[float(number)]]) for number in numbers]

    async def wait_started(self) -> None:
        """Return when the next forward has begun."""
        assert await asyncio.to_thread(self.started.acquire, timeout=10)

    def let_go(self, num_forwards: int = 1) -> None:
        """Let that many forwards end."""
        self.gate.release(num_forwards)


class FakeCores:
    """Remembers whether the service said it was busy while it computed."""

    def __init__(self) -> None:
        self.is_busy = False
        self.changes: list[bool] = []

    def set_busy(self, is_busy: bool) -> None:
        """Remember what was said."""
        self.changes.append(is_busy)

    def available_threads(self) -> int:
        """Return one."""
        return 1


def item(
    number: int, num_pixels: int = 10, *, modality: Modality = Modality.IMAGE, width: int = 1
) -> TowerInputs:
    return TowerInputs(modality, {"number": torch.full((1, width), number)}, num_pixels, 1)


@pytest.fixture
def tower() -> FakeTower:
    return FakeTower()


@pytest.fixture
def cores() -> FakeCores:
    return FakeCores()


@pytest_asyncio.fixture
async def batcher(tower: FakeTower, cores: FakeCores) -> AsyncIterator[EncodeBatcher]:
    batcher = EncodeBatcher(tower, ComputeThreads(cores), BatchLimits(max_items=3, max_pixels=40))
    batcher.start()
    yield batcher
    tower.let_go(100)
    await batcher.stop()


async def submit(batcher: EncodeBatcher, *items: TowerInputs) -> list[asyncio.Task[torch.Tensor]]:
    async def rows_of(inputs: TowerInputs) -> torch.Tensor:
        return (await batcher.submit(inputs)).rows

    tasks = [asyncio.create_task(rows_of(one)) for one in items]
    await asyncio.sleep(0)
    return tasks


async def test_an_idle_tower_takes_the_first_item_at_once(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    (task,) = await submit(batcher, item(1))
    await tower.wait_started()
    tower.let_go()

    assert (await task).tolist() == [[1.0]]


async def test_what_waits_while_the_tower_is_busy_forms_the_next_batch(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    first = await submit(batcher, item(1))
    await tower.wait_started()
    rest = await submit(batcher, *(item(n) for n in range(2, 7)))
    tower.let_go(10)

    results = await asyncio.gather(*first, *rest)

    assert tower.batches == [[1], [2, 3, 4], [5, 6]]
    assert [float(rows[0, 0]) for rows in results] == [1, 2, 3, 4, 5, 6]


async def test_a_batch_stays_below_the_pixel_budget_unless_it_is_one_item(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    first = await submit(batcher, item(1))
    await tower.wait_started()
    rest = await submit(batcher, item(2, 30), item(3, 10), item(4, 1), item(5, 999), item(6, 1))
    tower.let_go(10)
    await asyncio.gather(*first, *rest)

    assert tower.batches == [[1], [2, 3], [4], [5], [6]]


async def test_items_of_other_kinds_or_shapes_are_not_joined(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    first = await submit(batcher, item(1))
    await tower.wait_started()
    rest = await submit(
        batcher, item(2), item(3, modality=Modality.VIDEO), item(4), item(5, width=2), item(6)
    )
    tower.let_go(10)

    results = await asyncio.gather(*first, *rest)

    assert tower.batches == [[1], [2], [3], [4], [5], [6]]
    assert [float(rows[0, 0]) for rows in results] == [1, 2, 3, 4, 5, 6]


async def test_a_bad_item_fails_alone(batcher: EncodeBatcher, tower: FakeTower) -> None:
    first = await submit(batcher, item(1))
    await tower.wait_started()
    rest = await submit(batcher, item(2), item(13), item(4))
    tower.let_go(10)

    results = await asyncio.gather(*first, *rest, return_exceptions=True)

    assert isinstance(results[2], ValueError)
    rows = [result for result in results if isinstance(result, torch.Tensor)]
    assert [float(row[0, 0]) for row in rows] == [1, 2, 4]
    (after,) = await submit(batcher, item(7))
    assert (await after).tolist() == [[7.0]]


async def test_abandoned_items_leave_the_queue(batcher: EncodeBatcher, tower: FakeTower) -> None:
    first = await submit(batcher, item(1))
    await tower.wait_started()
    gone, stays = await submit(batcher, item(2), item(3))
    gone.cancel()
    await asyncio.wait([gone])
    tower.let_go(10)
    await asyncio.gather(*first, stays)

    assert tower.batches == [[1], [3]]


async def test_a_caller_that_goes_during_the_forward_disturbs_nobody(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    (gone,) = await submit(batcher, item(1))
    await tower.wait_started()
    (stays,) = await submit(batcher, item(2))
    gone.cancel()
    await asyncio.wait([gone])
    tower.let_go(10)

    assert (await stays).tolist() == [[2.0]]


async def test_stopping_ends_the_forward_and_fails_what_waits(
    tower: FakeTower, cores: FakeCores
) -> None:
    batcher = EncodeBatcher(tower, ComputeThreads(cores), BatchLimits(max_items=1, max_pixels=40))
    batcher.start()
    running, waiting = await submit(batcher, item(1), item(2))
    await tower.wait_started()
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    tower.let_go(10)
    await stopping

    assert (await running).tolist() == [[1.0]]
    with pytest.raises(UnavailableError):
        await waiting


async def test_peers_see_when_the_tower_computes(
    batcher: EncodeBatcher, tower: FakeTower, cores: FakeCores
) -> None:
    (task,) = await submit(batcher, item(1))
    await tower.wait_started()
    while_computing = list(cores.changes)
    tower.let_go()
    await task

    assert while_computing == [True]
    assert cores.changes == [True, False]


async def test_the_work_of_an_item_is_its_share_and_holds_no_wait(
    batcher: EncodeBatcher, tower: FakeTower
) -> None:
    running = asyncio.create_task(batcher.submit(item(1)))
    await tower.wait_started()
    waiting = [asyncio.create_task(batcher.submit(one)) for one in (item(2), item(3, 30))]
    await asyncio.sleep(0.1)
    tower.let_go(2)

    first, second, third = await asyncio.gather(running, *waiting)

    assert first.work_s >= 0.1
    assert second.work_s + third.work_s < 0.1
    assert third.work_s == pytest.approx(3 * second.work_s)
