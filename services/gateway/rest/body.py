"""Read request bodies within bounds of size, time and memory."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from chiasm.common.errors import (
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from ..budgets import ByteBudget


class BodyTimeoutError(InvalidRequestError):
    """The client did not send its body in time."""

    default_reason = "BODY_TIMEOUT"


class BodyReader:
    """Reads bodies; refuses before it buffers what is too large for one or for all."""

    def __init__(self, max_bytes: int, timeout_s: float, budget: ByteBudget) -> None:
        """Take the bounds.

        Args:
            max_bytes: Most bytes of one body.
            timeout_s: Most seconds for a body to arrive.
            budget: Bytes that all bodies together may hold.
        """
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._budget = budget

    @asynccontextmanager
    async def read(self, request: Request, *, takes_forms: bool = False) -> AsyncIterator[bytes]:
        """Lend the body of ``request``; its bytes count against the budget until it is left.

        Args:
            request: The request; its body must not have been read.
            takes_forms: Whether multipart/form-data is accepted besides JSON.

        Raises:
            InvalidRequestError: The content type is another, or the client is gone.
            TooLargeError: The body is over the limit; what was read is dropped.
            OverloadedError: All bodies together are over the budget.
            BodyTimeoutError: The body did not arrive in time.
        """
        content_type = request.headers.get("content-type", "")
        if not _is_json_type(content_type) and not (takes_forms and is_form_type(content_type)):
            raise InvalidRequestError("Unsupported Media Type: Only 'application/json' is allowed")
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_large()
        held = _Reservation(self._budget)
        try:
            yield await self._receive(request, held)
        finally:
            held.release()

    async def _receive(self, request: Request, held: _Reservation) -> bytes:
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                async for part in request.stream():
                    if held.num_bytes + len(part) > self._max_bytes:
                        raise self._too_large()
                    held.add(len(part))
                    parts.append(part)
        except TimeoutError:
            raise BodyTimeoutError("The body of the request did not arrive in time.") from None
        except ClientDisconnect:
            raise InvalidRequestError("The client went away before its request was read.") from None
        return b"".join(parts)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body of a request must have at most {self._max_bytes} bytes.")


class _Reservation:
    """What one body holds of the budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        if not self._budget.reserve(num_bytes):
            raise OverloadedError(
                "The server is reading as many request bytes as it can hold.", retry_after_s=1.0
            )
        self.num_bytes += num_bytes

    def release(self) -> None:
        self._budget.release(self.num_bytes)
        self.num_bytes = 0


def is_form_type(content_type: str) -> bool:
    """Return whether a content type is that of a form with files."""
    return _media_type(content_type) == "multipart/form-data"


def _is_json_type(content_type: str) -> bool:
    media_type = _media_type(content_type)
    return media_type == "application/json" or media_type.endswith("+json")


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
