"""Stream token ids from a generator process over gRPC, to the end or until a chosen token."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.common.grpc_client import open_channel
from chiasm.v1 import generator_pb2, generator_pb2_grpc, media_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from chiasm.v1.generator_pb2_grpc import GeneratorServiceAsyncStub
    from tests.harness.generator_process import GeneratorProcess

DEADLINE_S = 600.0


@dataclass(slots=True)
class Stream:
    """What came back for one prompt; times are of ``time.perf_counter``, in seconds.

    Attributes:
        sent_at: When the prompt was sent.
        token_ids: Tokens in order.
        token_times: When each of them arrived.
        is_finished: Whether the generator ended it.
    """

    sent_at: float
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    is_finished: bool = False

    @property
    def ttft_s(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.token_times[0] - self.sent_at


class GeneratorClient:
    """Sends greedy prompts of token ids that run to their full length."""

    def __init__(self, stub: GeneratorServiceAsyncStub) -> None:
        self._stub = stub

    async def generate(
        self, token_ids: Sequence[int], num_tokens: int, cancel_after: int | None = None
    ) -> Stream:
        """Generate ``num_tokens`` tokens, or cancel once ``cancel_after`` of them have come.

        Args:
            token_ids: The prompt.
            num_tokens: Tokens to ask for; the end token does not end the answer.
            cancel_after: Tokens to take before the call is cancelled; 0 cancels an admitted call.
        """
        sampling = generator_pb2.SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True
        )
        start = generator_pb2.GenerateStart(
            context=media_pb2.RequestContext(request_id="r", attempt_id="a", tenant="tenant"),
            token_ids=token_ids,
            sampling=sampling,
        )
        stream = Stream(time.perf_counter())
        call = self._stub.Generate(timeout=DEADLINE_S)
        await call.write(generator_pb2.GenerateRequest(start=start))
        await call.done_writing()
        async for response in call:
            if response.HasField("delta"):
                now = time.perf_counter()
                stream.token_ids.extend(response.delta.token_ids)
                stream.token_times.extend(now for _ in response.delta.token_ids)
            stream.is_finished = stream.is_finished or response.HasField("finished")
            if cancel_after is not None and len(stream.token_ids) >= cancel_after:
                call.cancel()
                break
        return stream

    async def num_used_blocks(self) -> int:
        """Return how many blocks live sequences hold."""
        request = generator_pb2.GetGeneratorInfoRequest()
        return (await self._stub.GetGeneratorInfo(request, timeout=DEADLINE_S)).num_used_blocks

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until no sequence holds a block.

        Raises:
            TimeoutError: One still did after ``timeout_s`` seconds.
        """
        async with asyncio.timeout(timeout_s):
            while await self.num_used_blocks():
                pass  # each look is a call, which is pause enough


@contextlib.asynccontextmanager
async def open_client(process: GeneratorProcess) -> AsyncIterator[GeneratorClient]:
    """Connect to a generator process until the context is left."""
    channel = open_channel(process.address, process.token)
    try:
        yield GeneratorClient(generator_pb2_grpc.GeneratorServiceStub(channel))
    finally:
        await channel.close()
