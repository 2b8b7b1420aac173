"""Tests of ``chiasm.common.circuit_breaker``."""

from __future__ import annotations

import pytest

from chiasm.common.circuit_breaker import BreakerSettings, CircuitBreaker


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def breaker(clock: _Clock) -> CircuitBreaker:
    return CircuitBreaker(BreakerSettings(2, first_open_s=1.0, longest_open_s=3.0), clock)


def _open(breaker: CircuitBreaker) -> None:
    for _ in range(2):
        assert breaker.admit()
        breaker.record_failure()


def test_it_opens_after_failures_in_a_row_only(breaker: CircuitBreaker) -> None:
    breaker.record_failure()
    breaker.record_success()
    breaker.record_failure()
    assert breaker.admit()
    breaker.record_failure()
    assert not breaker.admit()


def test_half_open_admits_one_probe(breaker: CircuitBreaker, clock: _Clock) -> None:
    _open(breaker)
    clock.now = 1.0
    assert breaker.admit()
    assert not breaker.admit()


def test_a_probe_that_succeeds_closes_it(breaker: CircuitBreaker, clock: _Clock) -> None:
    _open(breaker)
    clock.now = 1.0
    assert breaker.admit()
    breaker.record_success()
    assert breaker.admit()
    assert breaker.admit()
    assert not breaker.is_open


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound(
    breaker: CircuitBreaker, clock: _Clock
) -> None:
    _open(breaker)
    for wait_s in (1.0, 2.0, 3.0, 3.0):
        clock.now += wait_s - 0.01
        assert not breaker.admit()
        clock.now += 0.01
        assert breaker.admit()
        breaker.record_failure()


def test_a_probe_without_a_verdict_lets_another_one_through(
    breaker: CircuitBreaker, clock: _Clock
) -> None:
    _open(breaker)
    clock.now = 1.0
    assert breaker.admit()
    breaker.release()
    assert breaker.admit()


def test_late_failures_of_earlier_calls_do_not_prolong_the_wait(
    breaker: CircuitBreaker, clock: _Clock
) -> None:
    _open(breaker)
    clock.now = 0.9
    breaker.record_failure()
    clock.now = 1.0
    assert breaker.admit()


def test_a_success_resets_the_wait(breaker: CircuitBreaker, clock: _Clock) -> None:
    _open(breaker)
    clock.now = 1.0
    assert breaker.admit()
    breaker.record_failure()
    clock.now = 3.0
    assert breaker.admit()
    breaker.record_success()
    _open(breaker)
    clock.now = 4.0
    assert breaker.admit()


def test_a_suspicion_opens_it_and_may_be_probed_at_once(
    breaker: CircuitBreaker, clock: _Clock
) -> None:
    breaker.trip()
    assert breaker.is_open
    assert breaker.probe_in_s == 0
    assert breaker.admit()
    breaker.record_failure()
    assert breaker.probe_in_s == 2.0
    clock.now = 1.5
    assert breaker.probe_in_s == 0.5
    breaker.trip()
    assert not breaker.admit()


def test_a_probe_that_is_answered_forgives_no_failure(breaker: CircuitBreaker) -> None:
    _open(breaker)
    breaker.recover()
    assert breaker.admit()
    breaker.record_failure()
    assert breaker.is_open
    breaker.recover()
    breaker.record_success()
    breaker.record_failure()
    assert not breaker.is_open
