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
