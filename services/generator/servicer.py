"""Serve ``GeneratorService``: transport only."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from chiasm.common.logging import bind_request_id
from chiasm.generator.convert import event_to_proto, info_to_proto, read_start, read_updates
from chiasm.generator.convert_session import batch_to_proto, read_commands
from chiasm.generator.session import Session
from chiasm.v1 import generator_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc

    from chiasm.generator.generation import GenerationService
    from chiasm.generator.info import GeneratorInfo
    from chiasm.v1 import generator_pb2

    Context = grpc.aio.ServicerContext[Any, Any]


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """Converts, calls ``GenerationService``, converts."""

    def __init__(self, service: GenerationService, describe: Callable[[], GeneratorInfo]) -> None:
        """Serve ``service``; ``describe`` returns the current description of the generator."""
        self._service = service
        self._describe = describe

    async def Generate(  # noqa: N802 - named by the contract
        self,
        request_iterator: AsyncIterator[generator_pb2.GenerateRequest],
        context: Context,
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        """Generate for one prompt; see ``generator.proto``."""
        request = await read_start(request_iterator)
        bind_request_id(request.context.request_id)
        events = self._service.generate(request, read_updates(request_iterator))
        async with contextlib.aclosing(events):
            async for event in events:
                yield event_to_proto(event)

    async def Session(  # noqa: N802 - as above
        self,
        request_iterator: AsyncIterator[generator_pb2.SessionRequest],
        context: Context,
    ) -> AsyncIterator[generator_pb2.StepBatch]:
        """Generate for many prompts; see ``generator.proto``."""
        batches = Session(self._service).run(read_commands(request_iterator))
        async with contextlib.aclosing(batches):
            async for events in batches:
                yield batch_to_proto(events)

    async def GetGeneratorInfo(  # noqa: N802 - as above
        self, request: generator_pb2.GetGeneratorInfoRequest, context: Context
    ) -> generator_pb2.GetGeneratorInfoResponse:
        """Describe this generator; see ``generator.proto``."""
        return info_to_proto(self._describe())
