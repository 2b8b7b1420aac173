"""Bodies of ``/v1/media``: numbers of a form are those of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.rest.media_json import MediaBody, parse_put

if TYPE_CHECKING:
    from chiasm.gateway.media_object import MediaRequest

FILE = b'Content-Disposition: form-data; name="file"\r\nContent-Type: image/png\r\n\r\npixels'


def put(name: str, value: str) -> MediaRequest:
    field = f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()
    body = b"".join(b"--XX\r\n" + part + b"\r\n" for part in (FILE, field)) + b"--XX--\r\n"
    return parse_put(
        MediaBody(body, "multipart/form-data; boundary=XX", "r"), Limits(), MediaPolicy()
    )


@pytest.mark.parametrize("name", ["ttl_s", "max_pixels"])
@pytest.mark.parametrize("value", ["007", "٣", "0100000", "-01", "1_0", "1e3", "+5", " 5", "0x10"])
def test_a_field_that_is_no_number_of_json_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be an integer") as caught:
        put(name, value)
    assert caught.value.param == name


def test_a_field_that_is_a_number_counts_as_one() -> None:
    assert put("ttl_s", "70").ttl_s == 70
    assert put("max_pixels", "100000").item.options.max_pixels == 100_000
