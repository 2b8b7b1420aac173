"""A generator that says what it was told to: a real gRPC server with scripted tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import ChiasmError, MediaNotFoundError
from chiasm.common.grpc_server import GrpcServer
from chiasm.v1 import generator_pb2, generator_pb2_grpc, media_pb2
from tests.fakes.session_service import FakeSession

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

    import grpc


@dataclass(frozen=True, slots=True)
class Script:
    """What one call answers.

    Attributes:
        deltas: Token ids of each step; each has a log probability of -1 if that is asked for.
        finish_reason: Why it ends.
        stop_token_id: Token that ended it.
        needs: Embeddings that it asks for before the first step.
        error: Raised after the steps instead of finishing.
        hangs: Wait for ever after the steps.
        breaks_off: End after the steps without finishing.
        prompt_ranks: Ranks of the prompt's tokens from the second on, by message; told before the
            first step, each with a log probability of -1 and token 5 as the best.
        indices: Answer that each of ``deltas`` belongs to; empty: all to the first.
        num_cached_tokens: Prompt tokens that the prefix cache had for each answer; empty: none.
    """

    deltas: Sequence[Sequence[int]] = ()
    finish_reason: generator_pb2.FinishReason.ValueType = generator_pb2.FINISH_REASON_STOP
    stop_token_id: int | None = None
    needs: tuple[bytes, ...] = ()
    error: ChiasmError | None = None
    hangs: bool = False
    breaks_off: bool = False
    indices: tuple[int, ...] = ()
    prompt_ranks: tuple[tuple[int, ...], ...] = ()
    num_cached_tokens: tuple[int, ...] = ()


class FakeGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """Waits until every span is ready, then follows the next script.

    Attributes:
        script: Followed by calls when ``scripts`` is empty.
        scripts: Followed by the next calls, one each.
        refusals: Raised at once by the next calls, one each.
        session_errors: Raised at once by the next sessions, one each.
        num_sessions: Sessions opened.
        starts: First message of every call, in order.
        ready_ids: Embeddings reported as ready, after the start.
        chunk_ids: Embeddings whose last chunk came.
        chunks: All chunks, in order.
        failures: Embeddings reported as failed.
        stopped: Answers that callers wanted no more of.
        cancelled: Set when a caller cancels.
    """

    def __init__(
        self, *, max_model_len: int = 512, vocab_size: int = 1000, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self.info = generator_pb2.GetGeneratorInfoResponse(
            model="fake",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        self.forget()

    def forget(self) -> None:
        """Start afresh."""
        self.script = Script()
        self.refusals: list[ChiasmError] = []
        self.session_errors: list[ChiasmError] = []
        self.num_sessions = 0
        self.scripts: deque[Script] = deque()
        self.starts: list[generator_pb2.GenerateStart] = []
        self.ready_ids: list[bytes] = []
        self.chunk_ids: list[bytes] = []
        self.chunks: list[media_pb2.EmbeddingChunk] = []
        self.stopped: asyncio.Queue[int] = asyncio.Queue()
        self.failures: list[generator_pb2.EmbeddingFailed] = []
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()

    async def Generate(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[generator_pb2.GenerateRequest],
        context: grpc.aio.ServicerContext[
            generator_pb2.GenerateRequest, generator_pb2.GenerateResponse
        ],
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        """Follow a script."""
        async with aclosing(self._follow(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def Session(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[generator_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[generator_pb2.SessionRequest, generator_pb2.StepBatch],
    ) -> AsyncIterator[generator_pb2.StepBatch]:
        """Follow a script for each request."""
        self.num_sessions += 1
        if self.session_errors:
            raise self.session_errors.pop()
        async for batch in FakeSession(self._follow, self.stopped).run(request_iterator):
            yield batch

    async def _follow(
        self, request_iterator: AsyncIterator[generator_pb2.GenerateRequest]
    ) -> AsyncGenerator[generator_pb2.GenerateResponse, None]:
        if self.refusals:
            raise self.refusals.pop()
        has_ended = False
        try:
            start = (await anext(request_iterator)).start
            self.starts.append(start)
            self.started.set()
            script = self.scripts.popleft() if self.scripts else self.script
            yield generator_pb2.GenerateResponse(admitted=generator_pb2.Admitted(sequence_id=1))
            missing = {span.ref.embedding_id for span in start.spans if not span.is_ready}
            await self._wait(request_iterator, missing)
            for embedding_id in script.needs:
                need = generator_pb2.NeedEmbedding(embedding_id=embedding_id)
                yield generator_pb2.GenerateResponse(need=need)
                await self._wait(request_iterator, {embedding_id})
            for response in (*_prompt_responses(script), *_delta_responses(script, start)):
                yield response
            if script.error:
                raise script.error
            if script.hangs:
                await asyncio.Event().wait()
            if not script.breaks_off:
                for index in range(start.sampling.num_sequences or 1):
                    yield self._finished(start, script, index)
            has_ended = True
        except ChiasmError:
            has_ended = True
            raise
        finally:
            if not has_ended:
                self.cancelled.set()

    async def GetGeneratorInfo(  # noqa: N802 - named by the proto
        self,
        request: generator_pb2.GetGeneratorInfoRequest,
        context: grpc.aio.ServicerContext[
            generator_pb2.GetGeneratorInfoRequest, generator_pb2.GetGeneratorInfoResponse
        ],
    ) -> generator_pb2.GetGeneratorInfoResponse:
        """Describe the generator."""
        return self.info

    async def _wait(
        self, requests: AsyncIterator[generator_pb2.GenerateRequest], missing: set[bytes]
    ) -> None:
        while missing:
            request = await anext(requests)
            kind = request.WhichOneof("message")
            if kind == "ready":
                self.ready_ids.append(request.ready.embedding_id)
                missing.discard(request.ready.embedding_id)
            elif kind == "chunk" and not request.chunk.is_last:
                self.chunks.append(request.chunk)
            elif kind == "chunk":
                self.chunks.append(request.chunk)
                self.chunk_ids.append(request.chunk.embedding_id)
                missing.discard(request.chunk.embedding_id)
            elif kind == "failed":
                self.failures.append(request.failed)
                raise MediaNotFoundError(request.failed.message, reason=request.failed.reason)

    def _finished(
        self, start: generator_pb2.GenerateStart, script: Script, index: int
    ) -> generator_pb2.GenerateResponse:
        finished = generator_pb2.Finished(
            finish_reason=script.finish_reason,
            stop_token_id=script.stop_token_id,
            num_prompt_tokens=len(start.token_ids),
            num_output_tokens=sum(map(len, script.deltas)),
            num_cached_tokens=_num_cached(script, index),
            index=index,
        )
        return generator_pb2.GenerateResponse(finished=finished)


async def start_generator(
    generator: generator_pb2_grpc.GeneratorServiceServicer, token: str, address: str = "127.0.0.1:0"
) -> tuple[GrpcServer, int]:
    """Serve ``generator``; return its server and port."""
    server = GrpcServer(address=address, service_names=["chiasm.v1.GeneratorService"], token=token)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(generator, server.server)
    port = await server.start()
    await server.set_serving(True)
    return server, port


def _prompt_responses(script: Script) -> Iterator[generator_pb2.GenerateResponse]:
    start = 1
    for ranks in script.prompt_ranks:
        logprobs = [
            generator_pb2.TokenLogprobs(
                logprob=-1.0, rank=rank, top_token_ids=[5], top_logprobs=[-0.5]
            )
            for rank in ranks
        ]
        prompt = generator_pb2.PromptLogprobs(start=start, logprobs=logprobs)
        yield generator_pb2.GenerateResponse(prompt=prompt)
        start += len(ranks)


def _delta_responses(
    script: Script, start: generator_pb2.GenerateStart
) -> Iterator[generator_pb2.GenerateResponse]:
    indices = script.indices or (0,) * len(script.deltas)
    for index, token_ids in zip(indices, script.deltas, strict=True):
        delta = generator_pb2.TokenDelta(
            token_ids=token_ids, index=index, num_cached_tokens=_num_cached(script, index)
        )
        if start.sampling.HasField("num_logprobs"):
            likely = generator_pb2.TokenLogprobs(logprob=-1.0, rank=1)
            delta.logprobs.extend([likely] * len(token_ids))
        yield generator_pb2.GenerateResponse(delta=delta)


def _num_cached(script: Script, index: int) -> int:
    return script.num_cached_tokens[index] if script.num_cached_tokens else 0
