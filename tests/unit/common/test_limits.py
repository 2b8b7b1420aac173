"""A client's value may lower a limit, never raise it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.limits import Limits, check_size, clamp


@given(limit=st.integers(), requested=st.none() | st.integers())
def test_no_request_is_clamped_to_more_than_the_limit(limit: int, requested: int | None) -> None:
    clamped = clamp(limit, requested)

    assert clamped <= limit
    assert clamped in (limit, requested)


@given(size=st.integers(min_value=0, max_value=100))
def test_size_up_to_the_limit_passes_and_one_more_is_refused(size: int) -> None:
    check_size(size, size, "bytes", "image")

    with pytest.raises(TooLargeError, match=f"{size + 1} bytes is over the limit of {size}"):
        check_size(size + 1, size, "bytes", "image")


def test_negative_size_is_a_mistake_of_the_client() -> None:
    with pytest.raises(InvalidRequestError, match="must not be negative") as caught:
        check_size(-1, 10, "frames", "video.num_frames")

    assert caught.value.param == "video.num_frames"


def test_every_limit_is_positive_and_documented() -> None:
    for field in dataclasses.fields(Limits):
        assert getattr(Limits(), field.name) >= 1
        assert f"        {field.name}: " in (Limits.__doc__ or "")


def test_limits_never_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().max_pixels = 1 << 40  # type: ignore[misc]  # that it is refused is the point
