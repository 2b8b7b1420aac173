"""ASGI responses that run the pipeline and stop it when the client goes away."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import orjson
import structlog
from starlette.responses import Response

from chiasm.common.errors import ChiasmError, DeadlineExceededError

from ..chat_events import collect
from .disconnect import ClientStalledError, run_until_disconnect
from .errors import JSON_TYPE, envelope, error_response, internal_error
from .logprobs import logprobs_to_json, prompt_logprobs_to_json
from .sse import ChunkWriter, error_event, stream_chunks
from .usage import usage_to_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Receive, Scope, Send

    from ..chat_events import AnswerHead, ChatDelta, WholeAnswer, WholeChoice
    from .chat_json import ParsedChat
    from .logprobs import TokenBytes

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """What a response is made of.

    Attributes:
        head: What every message of the answer repeats.
        deltas: The running pipeline; closed by the response.
        headers: Headers of the response.
        bytes_of: Bytes of a token, for log probabilities.
        tells_media: Whether the usage tells of each media item.
    """

    head: AnswerHead
    deltas: AsyncGenerator[ChatDelta, None]
    headers: Mapping[str, str]
    bytes_of: TokenBytes
    tells_media: bool = False


class PlainAnswer(Response):
    """Sends the whole answer as one JSON object."""

    def __init__(self, source: AnswerSource) -> None:
        super().__init__()
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the pipeline and send its answer."""
        await run_until_disconnect(receive, send, partial(self._answer, scope, receive))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        source = self._source
        try:
            async with aclosing(source.deltas) as deltas:
                body = await _write(source, await collect(deltas))
            response = Response(body, 200, source.headers, JSON_TYPE)
        except ChiasmError as error:
            response = error_response(error)
        except Exception:
            log.exception("request_crashed")
            response = error_response(internal_error())
        await response(scope, receive, send)


class StreamedAnswer(Response):
    """Sends the answer as server-sent events; the status waits for the first delta."""

    def __init__(
        self, source: AnswerSource, parsed: ParsedChat, first_timeout_s: float | None
    ) -> None:
        """Take the answer to be.

        Args:
            source: What the response is made of.
            parsed: How the client wants the stream.
            first_timeout_s: Most seconds until the first delta; ``None`` for no bound of its own.
        """
        super().__init__()
        self._source = source
        self._includes_usage = parsed.includes_usage
        self._first_timeout_s = first_timeout_s
        self._writer = ChunkWriter(
            source.head,
            source.bytes_of,
            tells_media=source.tells_media,
            includes_usage=parsed.includes_usage,
            has_continuous_usage=parsed.has_continuous_usage,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the pipeline and send what it yields."""
        await run_until_disconnect(receive, send, partial(self._answer, scope, receive))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source.deltas) as deltas:
            try:
                first = await self._first(deltas)
            except ChiasmError as error:
                await error_response(error)(scope, receive, send)
                return
            except Exception:
                log.exception("request_crashed")
                await error_response(internal_error())(scope, receive, send)
                return
            await self._stream(first, deltas, send)

    async def _first(self, deltas: AsyncGenerator[ChatDelta, None]) -> ChatDelta:
        try:
            async with asyncio.timeout(self._first_timeout_s):
                return await anext(deltas)
        except TimeoutError:
            raise DeadlineExceededError("The first token did not come in time.") from None

    async def _stream(
        self, first: ChatDelta, deltas: AsyncGenerator[ChatDelta, None], send: Send
    ) -> None:
        headers = {
            **self._source.headers,
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
            }
        )
        events = stream_chunks(first, deltas, self._writer, includes_usage=self._includes_usage)
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientStalledError:
            raise
        except ChiasmError as error:
            body = error_event(envelope(error))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception:
            log.exception("request_crashed")
            body = error_event(envelope(internal_error()))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(source: AnswerSource, answer: WholeAnswer) -> bytes:
    if answer.is_long:
        return await asyncio.to_thread(_answer_to_json, source, answer)
    return _answer_to_json(source, answer)


def _answer_to_json(source: AnswerSource, answer: WholeAnswer) -> bytes:
    head, scored = source.head, answer.prompt_logprobs
    prompt = orjson.Fragment(prompt_logprobs_to_json(scored, source.bytes_of)) if scored else None
    return orjson.dumps(
        {
            "id": f"chatcmpl-{head.request_id}",
            "object": "chat.completion",
            "created": head.created_s,
            "model": head.model,
            "choices": [
                _choice_to_json(index, choice, source.bytes_of)
                for index, choice in enumerate(answer.choices)
            ],
            "usage": usage_to_json(answer.usage, tells_media=source.tells_media),
            "prompt_logprobs": prompt,
        }
    )


def _choice_to_json(index: int, choice: WholeChoice, bytes_of: TokenBytes) -> dict[str, object]:
    finish = choice.finish
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": orjson.Fragment(logprobs_to_json(choice.logprobs, bytes_of)),
        "finish_reason": finish.reason,
        "stop_reason": finish.stop_string or finish.stop_token_id,
    }
