"""Take the parts of a multipart/form-data body apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import check_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from python_multipart.multipart import MultipartCallbacks

    from chiasm.common.limits import Limits

_JSON_PARTS = ("request", "payload")
_MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class ChatBody:
    """The JSON of a chat request, and the files that came with it by name."""

    document: bytes
    files: Mapping[str, bytes] = field(default_factory=dict)


def split_form(body: bytes, content_type: str, limits: Limits) -> ChatBody:
    """Return the JSON part of a form and its files; slow for large bodies: call it in a thread.

    The JSON stands in the part named ``request`` or ``payload``. File names and content types of
    parts are not looked at.

    Args:
        body: The whole body.
        content_type: The request's content type with its boundary.
        limits: Bound on the number of parts.

    Raises:
        InvalidRequestError: The form is malformed, a part has no name or one that another has, or
            there is not exactly one JSON part.
        TooLargeError: There are too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequestError("The form's content type has no boundary.")
    parts = _FormParts(limits.max_form_parts)
    parser = MultipartParser(boundary, parts.callbacks())
    try:
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise InvalidRequestError("The body is not a valid multipart/form-data form.") from error
    if not parts.has_ended:
        raise InvalidRequestError("The form breaks off before its last boundary.")
    documents = [name for name in _JSON_PARTS if name in parts.files]
    if len(documents) != 1:
        raise InvalidRequestError(
            "A form must have one part named 'request' or 'payload' with the JSON of the request."
        )
    files = {name: data for name, data in parts.files.items() if name not in documents}
    return ChatBody(parts.files[documents[0]], files)


class _FormParts:
    """Collects the parts while the parser finds them.

    Attributes:
        files: Content of each part by its name.
        has_ended: Whether the closing boundary came.
    """

    def __init__(self, max_parts: int) -> None:
        self._max_parts = max_parts
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._pieces: list[bytes] = []
        self.files: dict[str, bytes] = {}
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
        check_size(len(self.files) + 1, self._max_parts, "parts of a form", "")
        self._name = ""
        self._pieces = []

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            # Clients percent-encode names or they do not; both mean the same name.
            self._name = unquote(options.get(b"name", b"").decode("utf-8", "replace"))
        self._header_name = self._header_value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end_part(self) -> None:
        if not 1 <= len(self._name) <= _MAX_NAME_CHARS:
            raise InvalidRequestError(
                f"Every part of a form must have a name of 1 to {_MAX_NAME_CHARS} characters."
            )
        if self._name in self.files:
            raise InvalidRequestError("Two parts of the form have the same name.")
        self.files[self._name] = b"".join(self._pieces)

    def _end(self) -> None:
        self.has_ended = True
