"""Tests of ``chiasm.gateway.rest.form``: whole forms, and forms that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.errors import ChiasmError, InvalidRequestError, TooLargeError
from chiasm.gateway.rest.form import FormPart, parse_form

TYPE = "multipart/form-data; boundary=XX"


def form(*parts: tuple[str, bytes], end: bytes = b"--XX--\r\n") -> bytes:
    """Return a form of parts with these headers and contents."""
    pieces = [b"--XX\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts]
    return b"".join(pieces) + end


def named(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


def test_parts_come_in_their_order_with_name_type_and_content() -> None:
    body = form(
        (named("uuid"), b"cat"),
        (f'{named("file")}; filename="a.png"\r\ncontent-type: image/png', b"\x89\r\n--X\r\n"),
        (named("empty"), b""),
    )

    assert parse_form(body, TYPE, 3) == [
        FormPart("uuid", "", b"cat"),
        FormPart("file", "image/png", b"\x89\r\n--X\r\n"),
        FormPart("empty", "", b""),
    ]


def test_a_quoted_boundary_is_understood() -> None:
    body = form((named("a"), b"1")).replace(b"XX", b"x y")
    assert parse_form(body, 'multipart/form-data; boundary="x y"', 1) == [FormPart("a", "", b"1")]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", TYPE),
        (b"no form", TYPE),
        (form((named("a"), b"1")), "multipart/form-data"),
        (form((named("a"), b"1")), "multipart/form-data; boundary="),
        (form((named("a"), b"1")), "multipart/form-data; boundary=YY"),
        (form((named("a"), b"1")), f"multipart/form-data; boundary={'Y' * 1000}"),
        (form((named("a"), b"1"), end=b""), TYPE),
        (form((named("a"), b"1"), end=b"--XX"), TYPE),
        (form((named(""), b"1")), TYPE),
        (form((named("a" * 257), b"1")), TYPE),
        (form(("content-type: image/png", b"1")), TYPE),
        (form(("x" * 10_000, b"1")), TYPE),
        (form(("\r\n".join(f"h{number}: x" for number in range(100)), b"1")), TYPE),
    ],
)
def test_what_is_no_whole_form_with_names_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_form(body, content_type, 8)


def test_more_parts_than_allowed_are_refused() -> None:
    body = form(*((named(str(number)), b"") for number in range(9)))
    with pytest.raises(TooLargeError):
        parse_form(body, TYPE, 8)


@given(st.lists(st.sampled_from([b"--XX", b"\r\n", b"--", b": ", b"a", b"\x00", b'"', b";"])))
def test_any_bytes_end_in_parts_or_a_refusal(pieces: list[bytes]) -> None:
    try:
        parts = parse_form(b"".join(pieces), TYPE, 8)
    except ChiasmError:
        return
    assert len(parts) <= 8
