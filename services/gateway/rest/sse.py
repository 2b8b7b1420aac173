"""Write a streamed answer as server-sent events, from bytes that are built once per request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from .logprobs import logprobs_to_json
from .usage import usage_to_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..chat_events import AnswerHead, ChatDelta, Finish, Usage
    from .logprobs import TokenBytes

DONE = b"data: [DONE]\n\n"

_FIRST_DELTA = b'{"role":"assistant","content":""}'


class ChunkWriter:
    """Builds the chunks of one answer."""

    def __init__(
        self,
        head: AnswerHead,
        bytes_of: TokenBytes,
        *,
        tells_media: bool,
        includes_usage: bool,
        has_continuous_usage: bool,
    ) -> None:
        fixed = orjson.dumps(
            {
                "id": f"chatcmpl-{head.request_id}",
                "object": "chat.completion.chunk",
                "created": head.created_s,
                "model": head.model,
            }
        )
        self._start = b"data: " + fixed[:-1] + b',"choices":'
        self._bytes_of = bytes_of
        self._tells_media = tells_media
        self._includes_usage = includes_usage
        self._has_continuous_usage = has_continuous_usage
        # Answers that were opened and have no text yet.
        self._fresh: set[int] = set()

    def first(self, index: int, usage: Usage) -> bytes:
        """Return the chunk that opens answer ``index`` and names its author."""
        self._fresh.add(index)
        return self._chunk(index, _FIRST_DELTA, b',"logprobs":null,"finish_reason":null', usage)

    def delta(self, delta: ChatDelta) -> bytes:
        """Return the chunk of a piece of the answer; its last one says why it ended."""
        content = b'{"content":' + orjson.dumps(delta.text) + b"}" if delta.text else b"{}"
        is_start = delta.index in self._fresh
        self._fresh.discard(delta.index)
        logprobs = logprobs_to_json(delta.logprobs, self._bytes_of, is_start=is_start)
        rest = b"".join(
            (b',"logprobs":', logprobs, b',"finish_reason":', _finish_json(delta.finish))
        )
        return self._chunk(delta.index, content, rest, delta.usage)

    def usage(self, usage: Usage) -> bytes:
        """Return the chunk without choices that tells the usage at the end."""
        document = usage_to_json(usage, tells_media=self._tells_media)
        return self._start + b'[],"usage":' + orjson.dumps(document) + b"}\n\n"

    def _chunk(self, index: int, delta: bytes, rest: bytes, usage: Usage) -> bytes:
        return b"".join(
            (
                self._start,
                b'[{"index":%d,"delta":' % index,
                delta,
                rest,
                b"}]",
                self._usage_json(usage),
                b"}\n\n",
            )
        )

    def _usage_json(self, usage: Usage) -> bytes:
        if self._has_continuous_usage:
            return b',"usage":' + orjson.dumps(usage_to_json(usage))
        return b',"usage":null' if self._includes_usage else b""


async def stream_chunks(
    first: ChatDelta, rest: AsyncIterator[ChatDelta], writer: ChunkWriter, *, includes_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the events of an answer whose first delta has come.

    Raises:
        ChiasmError: The answer failed after it began.
    """
    yield writer.first(first.index, first.usage)
    opened = {first.index}
    delta = first
    if _is_shown(delta):
        yield writer.delta(delta)
    async for delta in rest:
        if delta.index not in opened:
            opened.add(delta.index)
            yield writer.first(delta.index, delta.usage)
        if _is_shown(delta):
            yield writer.delta(delta)
    if includes_usage:
        yield writer.usage(delta.usage)
    yield DONE


def _is_shown(delta: ChatDelta) -> bool:
    return bool(delta.text or delta.finish or delta.logprobs)


def error_event(envelope: bytes) -> bytes:
    """Return the events that end a stream with an error."""
    return b"data: " + envelope + b"\n\n" + DONE


def _finish_json(finish: Finish | None) -> bytes:
    if finish is None:
        return b"null"
    stop_reason = finish.stop_string or finish.stop_token_id
    return orjson.dumps(finish.reason) + b',"stop_reason":' + orjson.dumps(stop_reason)
