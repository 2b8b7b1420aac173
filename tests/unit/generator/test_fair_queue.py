"""Room is made by those that hold most, and what was used last stays."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.generator.fair_queue import PROTECTED_S, FairQueue

TENANTS = "abc"


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return them."""
        return self.now


def _filled(*keys: str, clock: Clock | None = None) -> FairQueue[str]:
    """Return a queue with ``keys`` in order; the tenant is the first letter, each counts for 1."""
    queue: FairQueue[str] = FairQueue(clock or Clock())
    for key in keys:
        queue.charge(key[0], 1)
        queue.push(key, key[0])
    queue.check_invariants()
    return queue


def _make_room(queue: FairQueue[str], tenant: str) -> str:
    """Let go of one thing for ``tenant`` and charge what came of it."""
    key = queue.pop(tenant)
    queue.charge(key[0], -1)
    queue.charge(tenant, 1)
    queue.check_invariants()
    return key


def test_the_least_recently_used_of_one_tenant_goes_first() -> None:
    queue = _filled("a1", "a2", "a3")
    queue.remove("a1")
    queue.push("a1", "a")

    assert [queue.pop("a") for _ in range(3)] == ["a2", "a3", "a1"]
    assert len(queue) == 0


def test_the_tenant_that_holds_most_makes_room_whoever_asks() -> None:
    for asks in "abc":
        queue = _filled("b1", "a1", "a2")
        assert _make_room(queue, asks) == "a1"


def test_who_asks_makes_room_if_it_holds_as_much_as_any_other() -> None:
    queue = _filled("a1", "a2", "b1", "b2")
    assert _make_room(queue, "a") == "a1"
    queue = _filled("a1", "a2", "b1", "b2")
    assert _make_room(queue, "b") == "b1"


def test_who_asks_is_let_off_where_it_holds_less_or_has_nothing_here() -> None:
    queue = _filled("a1", "b1", "b2")
    assert _make_room(queue, "a") == "b1"
    queue = _filled("a1", "b1")
    queue.charge("c", 1)
    assert _make_room(queue, "c") == "b1"


def test_what_is_in_use_counts_as_held_and_does_not_go() -> None:
    queue = _filled("b1", "b2", "a1")
    queue.charge("a", 5)

    assert _make_room(queue, "b") == "a1"
    assert _make_room(queue, "b") == "b1"


def test_what_was_not_used_for_long_goes_first_whoever_holds_it() -> None:
    clock = Clock()
    queue = _filled("b1", clock=clock)
    clock.now = PROTECTED_S / 2
    for key in ("a1", "a2", "a3"):
        queue.charge("a", 1)
        queue.push(key, "a")

    clock.now = PROTECTED_S - 1
    assert queue.pop("a") == "a1"
    clock.now = PROTECTED_S
    assert queue.pop("a") == "b1"


def test_a_tenant_that_holds_nothing_is_forgotten() -> None:
    queue = _filled("a1", "b1")
    queue.charge("a", -1)
    queue.remove("a1")

    assert queue.charges == {"b": 1}
    queue.check_invariants()


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(TENANTS), st.integers(1, 4), st.booleans()), max_size=60
    ),
    room=st.integers(4, 20),
)
def test_nobody_below_its_share_loses_while_another_holds_more(
    steps: list[tuple[str, int, bool]], room: int
) -> None:
    """Tenants ask for things of any size and touch old ones; a model of the rule looks on."""
    queue: FairQueue[tuple[str, int]] = FairQueue(Clock())
    sizes: dict[tuple[str, int], int] = {}
    for number, (tenant, size, touches) in enumerate(steps):
        own = [key for key in sizes if key[0] == tenant]
        if touches and own:
            sizes[own[0]] = sizes.pop(own[0])
            queue.remove(own[0])
            queue.push(own[0], tenant)
            continue
        sizes[tenant, number] = size
        queue.charge(tenant, size)
        queue.push((tenant, number), tenant)
        while (total := sum(sizes.values())) > room:
            held = {name: sum(sizes[key] for key in sizes if key[0] == name) for name in TENANTS}
            key = queue.pop(tenant)
            assert held[key[0]] == max(held.values()) >= math.ceil(total / len(TENANTS))
            assert key == next(other for other in sizes if other[0] == key[0])
            queue.charge(key[0], -sizes.pop(key))
        queue.check_invariants()


@pytest.mark.parametrize("num_tenants", [1, 3])
def test_all_that_went_in_comes_out_once(num_tenants: int) -> None:
    keys = [f"{'abc'[i % num_tenants]}{i}" for i in range(30)]
    random.Random(1).shuffle(keys)
    queue = _filled(*keys)

    assert sorted(_make_room(queue, "x") for _ in keys) == sorted(keys)
    assert len(queue) == 0
    assert queue.charges == {"x": 30}
