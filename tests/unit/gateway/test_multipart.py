"""Forms: which part is the request, which are files, what is malformed."""

from __future__ import annotations

import pytest

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.limits import Limits
from chiasm.gateway.rest.multipart import split_form

TYPE = "multipart/form-data; boundary=edge"
LIMITS = Limits(max_form_parts=3)


def form(*parts: tuple[str, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    body = b""
    for name, data in parts:
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="../x"\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + end


@pytest.mark.parametrize("name", ["request", "payload"])
def test_the_json_part_and_the_files_come_apart(name: str) -> None:
    binary = bytes(range(256)) + b"\r\n--edg\r\n"

    body = split_form(form((name, b"{}"), ("cat", binary), ("empty", b"")), TYPE, LIMITS)

    assert body.document == b"{}"
    assert body.files == {"cat": binary, "empty": b""}


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (form(("cat", b"x")), TYPE, "one part named 'request' or 'payload'"),
        (form(("request", b"x"), ("payload", b"x")), TYPE, "one part named"),
        (form(("request", b"x"), ("request", b"x")), TYPE, "same name"),
        (form(("request", b"x"), ("", b"x")), TYPE, "must have a name of 1 to 256"),
        (form(("request", b"x"), ("n" * 257, b"x")), TYPE, "must have a name of 1 to 256"),
        (form(("request", b"x"), end=b""), TYPE, "breaks off"),
        (form(("request", b"x")), "multipart/form-data", "has no boundary"),
        (b"no form", TYPE, "not a valid multipart/form-data form"),
        (b"", TYPE, "breaks off"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_form_is_refused(body: bytes, content_type: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        split_form(body, content_type, LIMITS)


def test_the_number_of_parts_is_bounded() -> None:
    parts = [("request", b"{}"), ("a", b""), ("b", b"")]
    assert split_form(form(*parts), TYPE, LIMITS).document == b"{}"
    with pytest.raises(TooLargeError, match="4 parts of a form is over the limit of 3"):
        split_form(form(*parts, ("c", b"")), TYPE, LIMITS)


def test_the_head_of_a_part_is_bounded() -> None:
    head = b'--edge\r\nContent-Disposition: form-data; name="request"; x="' + b"y" * 10_000
    with pytest.raises(InvalidRequestError, match="not a valid multipart/form-data form"):
        split_form(head + b'"\r\n\r\n{}\r\n--edge--\r\n', TYPE, LIMITS)
