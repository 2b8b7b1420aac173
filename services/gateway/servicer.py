"""Serve ``ChatService``: the same pipeline as REST, one message in, messages out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from chiasm.v1 import chat_pb2, chat_pb2_grpc

from .chat_events import AnswerHead, Usage, collect
from .chat_request import Caller
from .convert import chat_request_from_proto
from .convert_answer import answer_to_proto, delta_to_proto, model_to_proto, usage_message
from .convert_media_objects import (
    estimate_request_from_proto,
    estimate_to_proto,
    name_from_proto,
    object_to_proto,
    page_from_proto,
    page_to_proto,
    put_request_from_proto,
    put_to_proto,
)
from .prompt_checks import check_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc
    from google.protobuf.message import Message

    from chiasm.common.limits import Limits

    from .auth import ApiKeys
    from .chat_request import ChatRequest
    from .chat_service import ChatPipeline
    from .media_library import MediaLibrary
    from .media_policy import MediaPolicy

_MAX_BYTES_ON_LOOP = 100_000

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
MessageT = TypeVar("MessageT", bound="Message")
ParsedT = TypeVar("ParsedT")


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    """Transport of ``ChatService``; errors are translated by the server's interceptor."""

    def __init__(
        self,
        pipeline: ChatPipeline,
        library: MediaLibrary,
        keys: ApiKeys,
        limits: Limits,
        request_timeout_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._library = library
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
        chat = await self._in_thread_if_large(chat_request_from_proto, request)
        async with aclosing(self._pipeline.run(chat, caller)) as deltas:
            answer = await collect(deltas)
        answer = replace(answer, usage=_shown(answer.usage, chat))
        if answer.is_long:
            return await asyncio.to_thread(answer_to_proto, self._head(chat), answer)
        return answer_to_proto(self._head(chat), answer)

    async def StreamChatCompletion(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.StreamChatCompletionRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.StreamChatCompletionRequest, chat_pb2.StreamChatCompletionResponse
        ],
    ) -> AsyncIterator[chat_pb2.StreamChatCompletionResponse]:
        """Answer a conversation as a stream of deltas."""
        caller = self._caller(context)
        chat = await self._in_thread_if_large(chat_request_from_proto, request.request)
        check_stream(chat.sampling)
        head = self._head(chat)
        usage = Usage()
        async with aclosing(self._pipeline.run(chat, caller)) as deltas:
            async for delta in deltas:
                usage = delta.usage
                yield delta_to_proto(head, delta)
        if request.include_usage or chat.includes_media_usage:
            yield usage_message(head, _shown(usage, chat))

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

    async def PutMedia(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.PutMediaRequest,
        context: grpc.aio.ServicerContext[chat_pb2.PutMediaRequest, chat_pb2.PutMediaResponse],
    ) -> chat_pb2.PutMediaResponse:
        """Encode a media item now and keep it."""
        caller = self._caller(context)
        parsed = await self._in_thread_if_large(put_request_from_proto, request)
        return put_to_proto(await self._library.put(parsed, caller))

    async def GetMedia(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.GetMediaRequest,
        context: grpc.aio.ServicerContext[chat_pb2.GetMediaRequest, chat_pb2.GetMediaResponse],
    ) -> chat_pb2.GetMediaResponse:
        """Describe a media item."""
        caller = self._caller(context)
        media = await self._library.get(name_from_proto(request), caller.tenant)
        return chat_pb2.GetMediaResponse(media=object_to_proto(media))

    async def DeleteMedia(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.DeleteMediaRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.DeleteMediaRequest, chat_pb2.DeleteMediaResponse
        ],
    ) -> chat_pb2.DeleteMediaResponse:
        """Forget a media item."""
        caller = self._caller(context)
        await self._library.delete(name_from_proto(request), caller.tenant)
        return chat_pb2.DeleteMediaResponse()

    async def ListMedia(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.ListMediaRequest,
        context: grpc.aio.ServicerContext[chat_pb2.ListMediaRequest, chat_pb2.ListMediaResponse],
    ) -> chat_pb2.ListMediaResponse:
        """List media items, a page at a time."""
        caller = self._caller(context)
        page = page_from_proto(request, self._limits)
        return page_to_proto(await self._library.page(caller.tenant, page))

    async def EstimateMedia(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.EstimateMediaRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.EstimateMediaRequest, chat_pb2.EstimateMediaResponse
        ],
    ) -> chat_pb2.EstimateMediaResponse:
        """Tell what a media item would cost."""
        caller = self._caller(context)
        parsed = await self._in_thread_if_large(estimate_request_from_proto, request)
        return estimate_to_proto(await self._library.estimate(parsed, caller))

    async def ForgetTenant(  # noqa: N802 - named by the proto
        self,
        request: chat_pb2.ForgetTenantRequest,
        context: grpc.aio.ServicerContext[
            chat_pb2.ForgetTenantRequest, chat_pb2.ForgetTenantResponse
        ],
    ) -> chat_pb2.ForgetTenantResponse:
        """Forget everything of the caller's tenant."""
        num_forgotten = await self._library.forget(self._caller(context))
        return chat_pb2.ForgetTenantResponse(num_forgotten=num_forgotten)

    def _caller(self, context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        authorization = metadata.get("authorization")
        tenant = self._keys.authenticate(authorization if isinstance(authorization, str) else None)
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return Caller(tenant, self._request_timeout_s)
        return Caller(tenant, min(remaining_s, self._request_timeout_s))

    async def _in_thread_if_large(
        self, parse: Callable[[MessageT, Limits, MediaPolicy], ParsedT], message: MessageT
    ) -> ParsedT:
        policy = self._pipeline.model.media_policy
        if message.ByteSize() <= _MAX_BYTES_ON_LOOP:
            return parse(message, self._limits, policy)
        return await asyncio.to_thread(parse, message, self._limits, policy)

    def _head(self, chat: ChatRequest) -> AnswerHead:
        return AnswerHead(chat.request_id, self._pipeline.model.name, int(time.time()))


def _shown(usage: Usage, chat: ChatRequest) -> Usage:
    """Return what the client is told of ``usage``."""
    return usage if chat.includes_media_usage else replace(usage, media=())
