"""Take a multipart/form-data body apart, within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import check_size

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class FormPart:
    """One part of a form; ``content_type`` is empty if the client named none."""

    name: str
    content_type: str
    data: bytes


def parse_form(body: bytes, content_type: str, max_parts: int) -> list[FormPart]:
    """Return the parts of a form in their order; slow for large bodies: call it in a thread.

    Args:
        body: The whole body; its size is checked already.
        content_type: The request's content type with its boundary.
        max_parts: Most parts that are accepted.

    Raises:
        InvalidRequestError: The form is malformed or breaks off, or a part has no usable name.
        TooLargeError: There are too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequestError("The form's content type has no boundary.")
    collector = _Collector(max_parts)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequestError("The body is not a valid multipart/form-data form.") from error
    if not collector.has_ended:
        raise InvalidRequestError("The form breaks off before its last boundary.")
    return collector.parts


class _Collector:
    """Collects the parts while the parser finds them.

    Attributes:
        parts: Parts that have ended.
        has_ended: Whether the closing boundary came.
    """

    def __init__(self, max_parts: int) -> None:
        self._max_parts = max_parts
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self.parts: list[FormPart] = []
        self.has_ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        check_size(len(self.parts) + 1, self._max_parts, "parts of a form", "")
        self._headers = {}
        self._pieces = []

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not 1 <= len(name) <= _MAX_NAME_CHARS:
            raise InvalidRequestError(
                f"Every part of a form must have a name of 1 to {_MAX_NAME_CHARS} characters."
            )
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self.parts.append(FormPart(name, content_type, b"".join(self._pieces)))
        self._pieces = []

    def _end(self) -> None:
        self.has_ended = True
