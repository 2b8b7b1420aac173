"""One turn at a time, that of the tenant that has taken least; nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import OverloadedError
from chiasm.generator import compile_turns
from chiasm.generator.compile_turns import MAX_WAITING, CompileTurns

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Bench:
    """Turns of tenants in the order in which they got them, on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = CompileTurns(lambda: self.now)
        self.order: list[str] = []

    async def ask(self, tenants: Iterable[str]) -> list[asyncio.Task[None]]:
        """Let one after the other ask for a turn; return when all wait or have it."""
        tasks = [asyncio.create_task(self._take(tenant)) for tenant in tenants]
        await self._settle()
        return tasks

    async def end(self, after_s: float) -> None:
        """End a turn that took so long."""
        self.now += after_s
        self.turns.end()
        await self._settle()

    async def _take(self, tenant: str) -> None:
        await self.turns.take(tenant)
        self.order.append(tenant)

    async def _settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.turns.check_invariants()


async def _refused(tasks: Iterable[asyncio.Task[None]]) -> int:
    """Return how many are refused, of those that have ended."""
    ended = [task for task in tasks if task.done()]
    results = await asyncio.gather(*ended, return_exceptions=True)
    return sum(isinstance(result, OverloadedError) for result in results)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_tenant_that_has_taken_least_time_is_next() -> None:
    bench = _Bench()
    await bench.ask("aaabbb")

    for after_s in (3, 1, 1, 1, 1):
        await bench.end(after_s)

    assert bench.order == [*"abbbaa"]


async def test_tenant_that_comes_back_has_saved_nothing_up() -> None:
    bench = _Bench()
    await bench.ask("baaa")
    await bench.end(1)
    for _ in range(2):
        await bench.end(10)

    await bench.ask("bbaa")
    for after_s in (10, 11, 10, 10):
        await bench.end(after_s)

    assert bench.order == [*"baaa", *"baba"]


async def test_turns_of_one_tenant_are_in_the_order_of_asking() -> None:
    bench = _Bench()
    first, second, third = await bench.ask("aaa")

    await bench.end(1)

    assert (first.done(), second.done(), third.done()) == (True, True, False)
    await _cancel([third])


async def test_tenant_that_waits_with_most_makes_room_for_others() -> None:
    bench = _Bench()
    flood = await bench.ask("a" * (1 + MAX_WAITING))

    others = await bench.ask("b" * MAX_WAITING)

    half = MAX_WAITING // 2
    assert (await _refused(flood), await _refused(others)) == (half, half)
    assert [task.done() for task in flood[1:]] == [False] * half + [True] * half
    await _cancel([*flood, *others])


async def test_tenant_that_waits_with_most_is_refused_itself() -> None:
    bench = _Bench()
    tasks = await bench.ask("a" * (1 + MAX_WAITING))

    (refused,) = await bench.ask("a")

    with pytest.raises(OverloadedError):
        await refused
    assert not any(task.done() for task in tasks[1:])
    await _cancel(tasks)


async def test_waiting_too_long_is_refused_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_turns, "MAX_WAIT_S", 0.01)
    bench = _Bench()
    _, late = await bench.ask("ab")

    with pytest.raises(OverloadedError):
        await late

    bench.turns.check_invariants()
    await bench.end(1)
    await bench.ask("c")
    assert bench.order == [*"ac"]


async def test_turn_of_one_who_leaves_as_it_comes_is_the_next_ones() -> None:
    bench = _Bench()
    _, leaving, waiting = await bench.ask("aaa")

    bench.turns.end()
    leaving.cancel()
    await waiting

    assert leaving.cancelled()
    bench.turns.check_invariants()


async def test_whatever_happens_all_get_a_turn_or_a_refusal() -> None:
    rng = random.Random(0)
    bench = _Bench()
    tasks: list[asyncio.Task[None]] = []
    num_turns = 0
    for _ in range(500):
        tasks += await bench.ask(rng.choices("abcd", (8, 2, 1, 1), k=rng.randrange(4)))
        if rng.random() < 0.2 and tasks:
            rng.choice(tasks).cancel()
        while num_turns < len(bench.order) and rng.random() < 0.7:
            num_turns += 1
            await bench.end(rng.random())
        await bench.ask("")
    while num_turns < len(bench.order):
        num_turns += 1
        await bench.end(1)

    assert all(task.done() for task in tasks)
    assert num_turns > MAX_WAITING
