"""Five hundred answers cancelled at random tokens leave nothing behind in the generator."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.checkpoints import VOCAB_SIZE, make_qwen2_vl
from tests.harness.generator_client import open_client
from tests.harness.generator_process import GeneratorProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.generator_client import GeneratorClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

NUM_CANCELS = 500
NUM_AT_ONCE = 48
MAX_CANCEL_AFTER = 12
NUM_TOKENS = 1500
FREE_TIMEOUT_S = 3.0
NUM_PROBE_TOKENS = 40


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GeneratorProcess]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("model"))
    running = GeneratorProcess(model, tmp_path_factory.mktemp("state"), "")
    yield running
    assert running.stop() == 0


def make_prompt(source: random.Random) -> list[int]:
    # Ids below 20 may be special tokens.
    return [source.randrange(20, VOCAB_SIZE) for _ in range(source.randint(1, 90))]


def read_steps(process: GeneratorProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.trace.read_text().splitlines()]


async def cancel_many(client: GeneratorClient, source: random.Random) -> list[int]:
    """Cancel all answers and return how many tokens each had delivered."""
    gate = asyncio.Semaphore(NUM_AT_ONCE)
    wishes = [
        (make_prompt(source), source.randint(0, MAX_CANCEL_AFTER)) for _ in range(NUM_CANCELS)
    ]

    async def cancel_one(prompt: list[int], cancel_after: int) -> int:
        async with gate:
            stream = await client.generate(prompt, NUM_TOKENS, cancel_after)
            assert not stream.is_finished
            assert len(stream.token_ids) >= cancel_after
            return len(stream.token_ids)

    return await asyncio.gather(*(cancel_one(*wish) for wish in wishes))


async def test_cancelled_answers_free_their_blocks_and_are_computed_no_further(
    process: GeneratorProcess,
) -> None:
    source = random.Random(3)
    async with open_client(process) as client:
        prompt = make_prompt(source)
        gold = (await client.generate(prompt, NUM_PROBE_TOKENS)).token_ids

        taken = await cancel_many(client, source)
        await client.wait_until_empty(FREE_TIMEOUT_S)

        # The first answer after them flushes a step that was under way; the second is watched.
        await client.generate(prompt, NUM_PROBE_TOKENS)
        num_before = len(read_steps(process))
        answer = await client.generate(prompt, NUM_PROBE_TOKENS)
        await client.wait_until_empty(FREE_TIMEOUT_S)
        steps = read_steps(process)

    assert len(taken) == NUM_CANCELS
    assert max(step["num_sequences"] for step in steps[:num_before]) >= NUM_AT_ONCE // 2
    assert answer.token_ids == gold
    watched = steps[num_before:]
    assert {step["num_sequences"] for step in watched} == {1}
    # One step may be ahead of a stop when it is noticed.
    assert NUM_PROBE_TOKENS <= len(watched) <= NUM_PROBE_TOKENS + 1
    assert watched[-1]["num_running"] == watched[-1]["num_waiting"] == 0
