"""Serve ``EncoderService``: convert, call, convert."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from chiasm.common.errors import ChiasmError
from chiasm.encoder.convert import (
    command_from_proto,
    description_to_proto,
    event_to_proto,
    lookup_key_from_proto,
    plan_to_proto,
    stored_to_proto,
)
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from chiasm.encoder.catalog import Catalog
    from chiasm.encoder.commands import EncoderDescription
    from chiasm.encoder.convert import SourceMessage
    from chiasm.encoder.item_encoder import ItemEncoder
    from chiasm.encoder.pipeline import EncodePipeline


_REST_TIMEOUT_S = 5.0


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """The RPCs of ``EncoderService``; the interceptors of the server translate errors."""

    def __init__(
        self,
        pipeline: EncodePipeline,
        catalog: Catalog,
        encoder: ItemEncoder,
        description: EncoderDescription,
    ) -> None:
        self._pipeline = pipeline
        self._catalog = catalog
        self._encoder = encoder
        self._description = description

    async def Encode(  # noqa: N802 - the name is the RPC's
        self,
        request_iterator: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse],
    ) -> AsyncIterator[encoder_pb2.EncodeResponse]:
        """Encode one item; see ``EncodePipeline.run``."""
        async with _read_to_the_end(request_iterator):
            command = await command_from_proto(request_iterator)
            async with aclosing(self._pipeline.run(command)) as events:
                async for event in events:
                    yield event_to_proto(event)

    async def Plan(  # noqa: N802 - the name is the RPC's
        self,
        request_iterator: AsyncIterator[encoder_pb2.PlanRequest],
        context: grpc.aio.ServicerContext[encoder_pb2.PlanRequest, encoder_pb2.PlanResponse],
    ) -> encoder_pb2.PlanResponse:
        """Plan one item; see ``EncodePipeline.plan``."""
        async with _read_to_the_end(request_iterator):
            command = await command_from_proto(request_iterator)
            return plan_to_proto(await self._pipeline.plan(command))

    async def Lookup(  # noqa: N802 - the name is the RPC's
        self,
        request: encoder_pb2.LookupRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.LookupRequest, encoder_pb2.LookupResponse],
    ) -> encoder_pb2.LookupResponse:
        """Look one item up; see ``Catalog.lookup``."""
        return stored_to_proto(await self._catalog.lookup(lookup_key_from_proto(request)))

    async def Delete(  # noqa: N802 - the name is the RPC's
        self,
        request: encoder_pb2.DeleteRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.DeleteRequest, encoder_pb2.DeleteResponse],
    ) -> encoder_pb2.DeleteResponse:
        """Forget one item; see ``Catalog.delete``."""
        was_there = await self._catalog.delete(lookup_key_from_proto(request))
        return encoder_pb2.DeleteResponse(deleted=was_there)

    async def GetEncoderInfo(  # noqa: N802 - the name is the RPC's
        self,
        request: encoder_pb2.GetEncoderInfoRequest,
        context: grpc.aio.ServicerContext[
            encoder_pb2.GetEncoderInfoRequest, encoder_pb2.GetEncoderInfoResponse
        ],
    ) -> encoder_pb2.GetEncoderInfoResponse:
        """Describe this encoder."""
        return description_to_proto(self._description, self._encoder.num_encoded_items)


@asynccontextmanager
async def _read_to_the_end(messages: AsyncIterator[SourceMessage]) -> AsyncIterator[None]:
    """Read what the caller still sends before an error ends the call.

    NOTE: a gRPC client whose write fails because the call is over reports INTERNAL, not the status
    that the call ended with.
    """
    try:
        yield
    except ChiasmError:
        with suppress(TimeoutError):
            async with asyncio.timeout(_REST_TIMEOUT_S):
                async for _ in messages:
                    pass
        raise
