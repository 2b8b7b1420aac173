"""Serve ``ChatService``: the same pipeline as REST, one message in, messages out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from chiasm.v1 import chat_pb2, chat_pb2_grpc

from .chat_events import AnswerHead, Usage, collect
from .chat_request import Caller
from .convert import chat_request_from_proto
from .convert_answer import answer_to_proto, delta_to_proto, model_to_proto, usage_message
from .prompt_checks import check_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from chiasm.common.limits import Limits

    from .auth import ApiKeys
    from .chat_request import ChatRequest
    from .chat_service import ChatPipeline

_MAX_BYTES_ON_LOOP = 100_000

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    """Transport of ``ChatService``; errors are translated by the server's interceptor."""

    def __init__(
        self, pipeline: ChatPipeline, keys: ApiKeys, limits: Limits, request_timeout_s: float
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._limits = limits
        self._request_timeout_s = request_timeout_s

    async def ChatCompletion(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.ChatCompletionRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.ChatCompletionRequest, chat_pb2.ChatCompletionResponse
        ],
    ) -> chat_pb2.ChatCompletionResponse:
        """Answer a conversation with one message."""
        caller = self._caller(context)
        chat = await self._read(request)
        async with aclosing(self._pipeline.run(chat, caller)) as deltas:
            return answer_to_proto(self._head(chat), await collect(deltas))

    async def StreamChatCompletion(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.StreamChatCompletionRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.StreamChatCompletionRequest, chat_pb2.StreamChatCompletionResponse
        ],
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        """Answer a conversation as a stream of deltas."""
        caller = self._caller(context)
        chat = await self._read(request.request)
        check_stream(chat.sampling)
        head = self._head(chat)
        usage = Usage()
        async with aclosing(self._pipeline.run(chat, caller)) as deltas:
            async for delta in deltas:
                usage = delta.usage
                yield delta_to_proto(head, delta)
        if request.include_usage:
            yield usage_message(head, usage)

    async def ListModels(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[chat_pb2.ListModelsRequest, chat_pb2.ListModelsResponse],
    ) -> chat_pb2.ListModelsResponse:
        """List the served models."""
        self._caller(context)
        card = self._pipeline.model_card()
        model = model_to_proto(card.name, card.max_model_len, card.modalities, card.created_s)
        return chat_pb2.ListModelsResponse(models=[model])

    def _caller(self, context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        authorization = metadata.get("authorization")
        tenant = self._keys.authenticate(authorization if isinstance(authorization, str) else None)
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return Caller(tenant, self._request_timeout_s)
        return Caller(tenant, min(remaining_s, self._request_timeout_s))

    async def _read(self, message: chat_pb2.ChatCompletionRequest) -> ChatRequest:
        policy = self._pipeline.model.media_policy
        if message.ByteSize() <= _MAX_BYTES_ON_LOOP:
            return chat_request_from_proto(message, self._limits, policy)
        return await asyncio.to_thread(chat_request_from_proto, message, self._limits, policy)

    def _head(self, chat: ChatRequest) -> AnswerHead:
        return AnswerHead(chat.request_id, self._pipeline.model.name, int(time.time()))
