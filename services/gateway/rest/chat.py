"""``POST /v1/chat/completions``: JSON in, pipeline, JSON or server-sent events out."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from ..chat_events import AnswerHead
from ..chat_request import Caller
from .answers import AnswerSource, PlainAnswer, StreamedAnswer
from .body import is_form_type
from .chat_json import parse_chat
from .multipart import ChatBody, split_form

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from chiasm.common.limits import Limits

    from ..auth import ApiKeys
    from ..chat_service import ChatPipeline
    from .body import BodyReader
    from .chat_json import ParsedChat

_MAX_BYTES_ON_LOOP = 100_000
_READ_TIMEOUT_HEADER = "x-stainless-read-timeout"


class ChatEndpoint:
    """The chat route with what it needs."""

    def __init__(
        self,
        pipeline: ChatPipeline,
        keys: ApiKeys,
        bodies: BodyReader,
        limits: Limits,
        request_timeout_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._bodies = bodies
        self._limits = limits
        self._request_timeout_s = request_timeout_s

    async def create_chat_completion(self, request: Request) -> Response:
        """Answer a conversation.

        Raises:
            ChiasmError: The request is refused before any work; later errors are answered by the
                response itself.
        """
        tenant = self._keys.authenticate(request.headers.get("authorization"))
        parsed = await self._parse(request)
        read_timeout_s = _read_timeout_s(request)
        timeout_s = self._request_timeout_s
        if read_timeout_s is not None and not parsed.is_stream:
            timeout_s = min(timeout_s, read_timeout_s)
        chat = parsed.request
        source = AnswerSource(
            head=AnswerHead(chat.request_id, self._pipeline.model.name, int(time.time())),
            deltas=self._pipeline.run(chat, Caller(tenant, timeout_s)),
            bytes_of=self._pipeline.model.tokenizer.bytes_of,
            tells_media=chat.includes_media_usage,
            headers={"x-ignored-fields": ", ".join(parsed.ignored)} if parsed.ignored else {},
        )
        if parsed.is_stream:
            return StreamedAnswer(source, parsed, read_timeout_s)
        return PlainAnswer(source)

    async def _parse(self, request: Request) -> ParsedChat:
        request_id: str = request.state.request_id
        content_type = request.headers.get("content-type", "")
        async with self._bodies.read(request, takes_forms=True) as body:
            if len(body) <= _MAX_BYTES_ON_LOOP:
                return self._parse_now(body, content_type, request_id)
            return await asyncio.to_thread(self._parse_now, body, content_type, request_id)

    def _parse_now(self, body: bytes, content_type: str, request_id: str) -> ParsedChat:
        is_form = is_form_type(content_type)
        chat = split_form(body, content_type, self._limits) if is_form else ChatBody(body)
        return parse_chat(chat, request_id, self._limits, self._pipeline.model.media_policy)


def _read_timeout_s(request: Request) -> float | None:
    """Return how long the client waits for bytes, as openai's clients tell; ``None`` if unknown."""
    try:
        seconds = float(request.headers.get(_READ_TIMEOUT_HEADER, ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
