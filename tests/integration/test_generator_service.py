"""The generator as a process: real gRPC and Redis, tiny checkpoints, the whole model as oracle."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
import pytest

from chiasm.common.convert import span_to_proto
from chiasm.common.grpc_client import error_from_rpc, open_channel
from chiasm.v1 import generator_pb2, generator_pb2_grpc, media_pb2
from tests.fakes.checkpoints import make_llava, make_qwen2_5_vl, make_qwen2_vl
from tests.fakes.embeddings import patient_store
from tests.fakes.whole_model import WholeModel
from tests.harness.generator_process import GeneratorProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.errors import ChiasmError
    from chiasm.v1.generator_pb2_grpc import GeneratorServiceAsyncStub
    from tests.fakes.whole_model import MediaPrompt

    Call = grpc.aio.StreamStreamCall[generator_pb2.GenerateRequest, generator_pb2.GenerateResponse]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TENANT = "tenant"
MAX_TOKENS = 32
DEADLINE_S = 30.0
WAIT_S = 10.0
CHUNK_BYTES = 1000
MAKERS = {"qwen2_vl": make_qwen2_vl, "qwen2_5_vl": make_qwen2_5_vl, "llava": make_llava}


@dataclass(frozen=True)
class Server:
    """A running generator with the reference for its answers."""

    process: GeneratorProcess
    whole: WholeModel
    redis_url: str


@pytest.fixture(scope="module", params=MAKERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_url: str
) -> Iterator[Server]:
    model = MAKERS[request.param](tmp_path_factory.mktemp("model"))
    process = GeneratorProcess(model, tmp_path_factory.mktemp("state"), redis_url)
    try:
        yield Server(process, WholeModel(model), redis_url)
    finally:
        process.stop()


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[GeneratorServiceAsyncStub]:
    async with _open_stub(server.process) as stub:
        yield stub


@contextlib.asynccontextmanager
async def _open_stub(process: GeneratorProcess) -> AsyncIterator[GeneratorServiceAsyncStub]:
    channel = open_channel(process.address, process.token)
    try:
        yield generator_pb2_grpc.GeneratorServiceStub(channel)
    finally:
        await channel.close()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[EmbeddingStore]:
    store = patient_store(server.redis_url, server.process.secrets)
    yield store
    await store.close()


async def _put(store: EmbeddingStore, prompts: Sequence[MediaPrompt]) -> None:
    for prompt in prompts:
        for span, embedding in zip(prompt.spans, prompt.embeddings, strict=True):
            await store.put(TENANT, embedding, span.layout)


def _start(
    prompt: MediaPrompt, sampling: Mapping[str, float] | None = None, *, is_ready: bool = True
) -> generator_pb2.GenerateRequest:
    values = {"max_tokens": MAX_TOKENS, "temperature": 0.0, **(sampling or {})}
    start = generator_pb2.GenerateStart(
        context=media_pb2.RequestContext(request_id="r", attempt_id="a", tenant=TENANT),
        token_ids=prompt.token_ids,
        spans=[span_to_proto(replace(span, is_ready=is_ready)) for span in prompt.spans],
        sampling=generator_pb2.SamplingParams(**values),  # type: ignore[arg-type]  # by name
    )
    return generator_pb2.GenerateRequest(start=start)


async def _open_call(
    stub: GeneratorServiceAsyncStub, *messages: generator_pb2.GenerateRequest
) -> Call:
    call: Call = stub.Generate(timeout=DEADLINE_S)
    for message in messages:
        await call.write(message)
    return call


async def _read_tokens(call: Call) -> list[int]:
    """Return the tokens of a call whose embeddings need no more messages."""
    tokens: list[int] = []
    async for response in call:
        tokens.extend(response.delta.token_ids)
    return tokens


async def _generate(
    stub: GeneratorServiceAsyncStub,
    prompt: MediaPrompt,
    sampling: Mapping[str, float] | None = None,
) -> list[int]:
    call = await _open_call(stub, _start(prompt, sampling))
    await call.done_writing()
    return await _read_tokens(call)


async def _fail(call: Call) -> ChiasmError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await _read_tokens(call)
    return error_from_rpc(failed.value)


async def _num_used_blocks(stub: GeneratorServiceAsyncStub) -> int:
    request = generator_pb2.GetGeneratorInfoRequest()
    return (await stub.GetGeneratorInfo(request, timeout=DEADLINE_S)).num_used_blocks


async def _uses_blocks(stub: GeneratorServiceAsyncStub, is_so: Callable[[int], bool]) -> bool:
    """Return whether ``is_so`` of the number of used blocks, which may lag behind the answers."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while not is_so(await _num_used_blocks(stub)):
                pass
            return True
    return False


def _chunks(prompt: MediaPrompt) -> Iterator[generator_pb2.GenerateRequest]:
    for embedding in prompt.embeddings:
        data = bytes(embedding.buffers[0])
        for offset in range(0, len(data), CHUNK_BYTES):
            chunk = media_pb2.EmbeddingChunk(
                embedding_id=embedding.ref.embedding_id,
                offset=offset,
                data=data[offset : offset + CHUNK_BYTES],
                is_last=offset + CHUNK_BYTES >= len(data),
            )
            yield generator_pb2.GenerateRequest(chunk=chunk)


@pytest.mark.parametrize("num_images", [0, 1, 3])
async def test_tokens_equal_the_whole_model(
    server: Server, stub: GeneratorServiceAsyncStub, store: EmbeddingStore, num_images: int
) -> None:
    prompt = server.whole.make_prompt(num_images, seed=num_images)
    await _put(store, [prompt])

    assert await _generate(stub, prompt) == list(prompt.answer)


async def test_eight_at_once_share_forwards_and_equal_the_whole_model(
    server: Server, stub: GeneratorServiceAsyncStub, store: EmbeddingStore
) -> None:
    counts = (0, 1, 3, 0, 1, 3, 1, 3)
    prompts = [server.whole.make_prompt(count, 10 + i) for i, count in enumerate(counts)]
    gold = [list(prompt.answer) for prompt in prompts]
    await _put(store, prompts)

    answers = await asyncio.gather(*(_generate(stub, prompt) for prompt in prompts))

    assert answers == gold
    assert max(len(set(answer)) for answer in gold) >= 20
    assert max(server.process.step_sizes()) >= 4


async def test_missing_embedding_is_needed_and_taken_inline(
    server: Server, stub: GeneratorServiceAsyncStub
) -> None:
    prompt = server.whole.make_prompt(1, seed=30)
    call = await _open_call(stub, _start(prompt))
    answers = aiter(call)

    assert (await anext(answers)).HasField("admitted")
    need = (await anext(answers)).need
    for chunk in _chunks(prompt):
        await call.write(chunk)
    await call.done_writing()

    assert need.embedding_id == prompt.spans[0].ref.embedding_id
    assert await _read_tokens(call) == list(prompt.answer)


async def test_embedding_may_come_later(
    server: Server, stub: GeneratorServiceAsyncStub, store: EmbeddingStore
) -> None:
    prompt = server.whole.make_prompt(3, seed=31)
    call = await _open_call(stub, _start(prompt, is_ready=False))
    assert (await anext(aiter(call))).HasField("admitted")

    await _put(store, [prompt])
    for span in reversed(prompt.spans):
        ready = generator_pb2.EmbeddingReady(embedding_id=span.ref.embedding_id)
        await call.write(generator_pb2.GenerateRequest(ready=ready))
    await call.done_writing()

    assert await _read_tokens(call) == list(prompt.answer)


async def test_caller_that_closes_too_early_gets_failed_precondition(
    server: Server, stub: GeneratorServiceAsyncStub
) -> None:
    prompt = server.whole.make_prompt(1, seed=32)
    call = await _open_call(stub, _start(prompt, is_ready=False))
    await call.done_writing()

    error = await _fail(call)

    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "EMBEDDING_EXPIRED"


async def test_seed_fixes_the_answer_alone_and_in_company(
    server: Server, stub: GeneratorServiceAsyncStub
) -> None:
    prompt = server.whole.make_prompt(0, seed=33)
    wishes = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 5}

    alone = await _generate(stub, prompt, wishes)
    others = (server.whole.make_prompt(0, seed) for seed in range(40, 45))
    together = await asyncio.gather(
        _generate(stub, prompt, wishes), *(_generate(stub, other) for other in others)
    )

    assert together[0] == alone
    assert await _generate(stub, prompt, {**wishes, "seed": 6}) != alone


async def test_refusals_carry_reason_and_field(
    server: Server, stub: GeneratorServiceAsyncStub
) -> None:
    prompt = server.whole.make_prompt(0, seed=34)
    long = replace(prompt, token_ids=(5,) * 3000)

    temperature = await _fail(await _open_call(stub, _start(prompt, {"temperature": -1.0})))
    length = await _fail(await _open_call(stub, _start(long)))

    assert (temperature.reason, temperature.param) == ("INVALID_REQUEST", "temperature")
    assert length.reason == "PROMPT_TOO_LONG"
    assert length.message.startswith("This model's maximum context length is 2048 tokens.")


async def test_cancelled_calls_free_their_blocks(
    server: Server, stub: GeneratorServiceAsyncStub
) -> None:
    prompts = [server.whole.make_prompt(count, 50 + i) for i, count in enumerate((0, 1) * 8)]
    calls = [
        await _open_call(stub, _start(prompt, {"max_tokens": 1500}, is_ready=False))
        for prompt in prompts
    ]
    for call in calls:
        await anext(aiter(call))
    assert await _uses_blocks(stub, lambda count: count >= len(calls))

    for call in calls:
        call.cancel()

    assert await _uses_blocks(stub, lambda count: count == 0)


async def test_caller_without_the_service_token_is_refused(server: Server) -> None:
    channel = open_channel(server.process.address, None)
    stub: GeneratorServiceAsyncStub = generator_pb2_grpc.GeneratorServiceStub(channel)

    call = await _open_call(stub)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _read_tokens(call)

    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await channel.close()


async def test_terminated_generator_finishes_its_calls_and_exits_cleanly(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    process = await asyncio.to_thread(GeneratorProcess, server.whole.path, state_dir, "")
    prompt = server.whole.make_prompt(1, seed=60)
    async with _open_stub(process) as stub:
        call = await _open_call(stub, _start(prompt, is_ready=False), *_chunks(prompt))
        await call.done_writing()
        await anext(aiter(call))

        stopping = asyncio.create_task(asyncio.to_thread(process.stop))
        tokens = await _read_tokens(call)

    assert tokens == list(prompt.answer)
    assert await stopping == 0
