"""Work over a budget is refused at once, and what was taken is given back."""

from __future__ import annotations

import pytest

from chiasm.common.errors import OverloadedError
from chiasm.encoder.admission import Admission, AdmissionLimits

LIMITS = AdmissionLimits(max_items=2, max_source_bytes=100, max_pixels=1000)


def test_items_up_to_the_limit_are_admitted_and_one_more_is_not() -> None:
    admission = Admission(LIMITS)

    with admission.admit(), admission.admit():
        with pytest.raises(OverloadedError) as caught:
            admission.admit()
        assert caught.value.retry_after_s == 1.0
    with admission.admit():
        pass


def test_bytes_up_to_the_limit_are_charged_and_one_more_is_not() -> None:
    admission = Admission(LIMITS)

    with admission.admit() as first, admission.admit() as second:
        first.charge_source(60)
        second.charge_source(40)
        with pytest.raises(OverloadedError):
            second.charge_source(1)
    with admission.admit() as ticket:
        ticket.charge_source(100)


def test_pixels_up_to_the_limit_are_charged_and_one_more_is_not() -> None:
    admission = Admission(LIMITS)

    with admission.admit() as first, admission.admit() as second:
        first.charge_pixels(999)
        second.charge_pixels(1)
        with pytest.raises(OverloadedError):
            first.charge_pixels(1)
    with admission.admit() as ticket:
        ticket.charge_pixels(1000)


def test_a_failing_item_gives_back_what_it_took() -> None:
    admission = Admission(LIMITS)

    with pytest.raises(OverloadedError), admission.admit() as ticket:  # noqa: PT012 - the last raises
        ticket.charge_pixels(1000)
        ticket.charge_source(100)
        ticket.charge_source(1)

    with admission.admit() as ticket:
        ticket.charge_pixels(1000)
        ticket.charge_source(100)


def test_the_advice_to_retry_follows_the_queue_and_the_speed() -> None:
    admission = Admission(LIMITS)
    admission.observe(num_pixels=100, seconds=1.0)

    with admission.admit() as ticket:
        ticket.charge_pixels(1000)
        with pytest.raises(OverloadedError) as caught:
            ticket.charge_pixels(1)
    assert caught.value.retry_after_s == pytest.approx(10.0)

    admission.observe(num_pixels=1, seconds=1e6)
    with admission.admit() as ticket:
        ticket.charge_pixels(1000)
        with pytest.raises(OverloadedError) as caught:
            ticket.charge_pixels(1)
    assert caught.value.retry_after_s == 60.0


def test_items_that_would_wait_too_long_are_refused_at_once() -> None:
    admission = Admission(AdmissionLimits(9, 100, 10_000, max_wait_s=5.0))
    with admission.admit() as first, admission.admit() as second:
        first.queue_work(b"unmeasured", 900)
        second.queue_work(b"too", 900)
    admission.observe(num_pixels=100, seconds=1.0)

    with admission.admit() as first, admission.admit() as same, admission.admit() as other:
        first.queue_work(b"large", 600)  # 6 s, but nothing is before it
        same.queue_work(b"large", 600)
        other.charge_pixels(700)
        with pytest.raises(OverloadedError) as caught:
            other.queue_work(b"other", 1)
        assert caught.value.retry_after_s == pytest.approx(7.0)
    with admission.admit() as first, admission.admit() as second:
        first.queue_work(b"fits", 500)
        second.queue_work(b"large", 9000)


def test_tiny_items_hardly_change_the_estimate() -> None:
    admission = Admission(AdmissionLimits(9, 100, 10_000_000, max_wait_s=5.0))
    admission.observe(num_pixels=1_000_000, seconds=1.0)
    admission.observe(num_pixels=1, seconds=0.1)

    with admission.admit() as first, admission.admit() as second:
        first.queue_work(b"large", 4_000_000)
        second.queue_work(b"next", 4_000_000)
        with pytest.raises(OverloadedError), admission.admit() as third:
            third.queue_work(b"last", 1)
