"""Threads are given up while other processes keep them from running."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from chiasm.common.thread_bound import ThreadBound

LAYER_S = 0.01
WANTED = 4


class Machine:
    """A machine of which other processes take ``num_taken`` cores, and its clocks."""

    def __init__(self, num_taken: int = 0) -> None:
        self.num_taken = num_taken
        self.now = self.cpu = 0.0
        self.bound = ThreadBound(wall=lambda: self.now, cpu=lambda: self.cpu)
        self.crowded_share = 0.5

    def compute(self, seconds: float, wanted: int = WANTED) -> list[int]:
        """Compute layers for as long; return the threads of each."""
        seen = []
        for _ in range(round(seconds / LAYER_S)):
            seen.append(self.bound.apply(wanted))
            is_crowded = seen[-1] + self.num_taken > WANTED
            self.now += LAYER_S
            self.cpu += LAYER_S * (self.crowded_share if is_crowded else 1.0)
        return seen

    def sleep(self, seconds: float) -> None:
        """Let time pass in which nothing is computed."""
        self.bound.pause()
        self.now += seconds


def test_all_threads_are_used_on_a_machine_of_our_own() -> None:
    assert set(Machine().compute(10)) == {WANTED}


@pytest.mark.parametrize("num_taken", [1, 2, 3, 4])
def test_as_many_threads_are_given_up_as_cores_are_taken(num_taken: int) -> None:
    machine = Machine(num_taken)

    seen = machine.compute(1.5)

    assert seen[-1] == max(1, WANTED - num_taken)


def test_a_thread_is_not_given_up_for_what_takes_little_of_a_core() -> None:
    machine = Machine(1)
    machine.crowded_share = 0.71

    assert set(machine.compute(10)) == {WANTED}


def test_a_short_disturbance_costs_no_thread() -> None:
    machine = Machine()

    for _ in range(20):
        machine.num_taken = 1
        assert set(machine.compute(0.2)) == {WANTED}
        machine.num_taken = 0
        assert set(machine.compute(0.3)) == {WANTED}


def test_threads_come_back_when_the_cores_are_free() -> None:
    machine = Machine(3)
    machine.compute(1.5)
    machine.num_taken = 0

    seen = machine.compute(40)

    assert seen[-1] == WANTED
    assert seen == sorted(seen)


def test_trials_become_rare_while_a_core_stays_taken() -> None:
    machine = Machine(1)
    machine.compute(100)

    seen = machine.compute(100)

    # A trial takes 0.1 s of every 8 s.
    assert 0 < seen.count(WANTED) <= 13 * 0.12 / LAYER_S
    assert min(seen) == WANTED - 1


def test_a_core_that_is_taken_again_is_left_at_once_and_tried_again_soon() -> None:
    machine = Machine(1)
    machine.compute(100)
    machine.num_taken = 0
    machine.compute(40)
    machine.num_taken = 1
    machine.compute(0.5)
    machine.num_taken = 0

    assert machine.compute(2)[-1] == WANTED


def test_waiting_for_work_is_not_taken_for_crowding() -> None:
    machine = Machine()

    for _ in range(100):
        assert set(machine.compute(0.05)) == {WANTED}
        machine.sleep(1)


def test_one_thread_is_never_given_up_nor_tried_to_double() -> None:
    machine = Machine(WANTED)

    assert set(machine.compute(5, wanted=1)) == {1}


def test_crowding_and_its_end_are_told_once_each() -> None:
    machine = Machine(1)
    with capture_logs() as logs:
        machine.compute(100)
        machine.num_taken = 0
        machine.compute(100)

    assert [log["event"] for log in logs] == ["cores_are_crowded", "cores_are_free"]
