"""Read a chat request that came as a multipart/form-data body."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from chiasm.common.errors import InvalidRequestError

from .form import parse_form

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.limits import Limits

_JSON_PARTS = ("request", "payload")


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
    files: dict[str, bytes] = {}
    for part in parse_form(body, content_type, limits.max_form_parts):
        # Clients percent-encode names or they do not; both mean the same name.
        name = unquote(part.name)
        if name in files:
            raise InvalidRequestError("Two parts of the form have the same name.")
        files[name] = part.data
    documents = [name for name in _JSON_PARTS if name in files]
    if len(documents) != 1:
        raise InvalidRequestError(
            "A form must have one part named 'request' or 'payload' with the JSON of the request."
        )
    document = files.pop(documents[0])
    return ChatBody(document, files)
