"""The border between event loop and engine thread."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import OverloadedError, UnavailableError
from chiasm.generator.engine.async_engine import AsyncEngine, EngineDeadError
from chiasm.generator.engine.outputs import EngineState, Finished, TokenDelta
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Origin
from tests.fakes.generator_engine import EngineParts, expected_tokens, make_prompt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.generator.engine.outputs import StepStatistics
    from chiasm.generator.engine.sequence_stream import SequenceStream

GREEDY = SamplingParams(6, temperature=0.0)


class _Threads:
    """Counts what the engine thread does with the cores."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.is_busy = False

    def begin_step(self) -> None:
        self.num_steps += 1
        self.is_busy = True

    def rest(self) -> None:
        self.is_busy = False


class _LastState:
    """Remembers what the engine held when it was last asked."""

    def __init__(self) -> None:
        self.state: EngineState | None = None
        self.went_idle = threading.Event()

    def observe(self, statistics: StepStatistics) -> None:
        self.state = statistics.state

    def observe_state(self, state: EngineState) -> None:
        self.state = state
        self.went_idle.set()


class _Setup:
    def __init__(self, max_waiting: int = 100) -> None:
        self.last = _LastState()
        self.threads = _Threads()
        self.parts = EngineParts(
            num_blocks=64, observers=[self.last], begin_step=self.threads.begin_step
        )
        budget = QueueBudget(QueueLimits(max_waiting, 10_000, 1 << 20))
        self.engine = AsyncEngine(self.parts.engine, budget, self.threads)


@pytest.fixture
async def setup() -> AsyncIterator[_Setup]:
    setup = _Setup()
    setup.engine.start()
    yield setup
    await setup.engine.stop()


async def _read_all(stream: SequenceStream) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    while True:
        event = await stream.read()
        if isinstance(event, Finished):
            return tokens, event
        assert isinstance(event, TokenDelta)
        tokens.extend(event.token_ids)


async def test_sequences_at_once_get_their_own_tokens(setup: _Setup) -> None:
    prompts = [[index + 1, 5, 9] for index in range(20)]
    streams = [setup.engine.submit(make_prompt(prompt), GREEDY) for prompt in prompts]

    results = await asyncio.gather(*map(_read_all, streams))

    for prompt, (tokens, finished) in zip(prompts, results, strict=True):
        assert tokens == expected_tokens(prompt, 6)
        assert finished.num_output_tokens == 6


async def test_slow_reader_gets_merged_tokens_and_stalls_nobody(setup: _Setup) -> None:
    slow = setup.engine.submit(make_prompt([1, 2]), GREEDY)
    fast = setup.engine.submit(make_prompt([3, 4]), SamplingParams(12, temperature=0.0))

    await _read_all(fast)

    assert slow.has_ended
    delta = await slow.read()
    assert delta == TokenDelta(tuple(expected_tokens([1, 2], 6)))
    assert isinstance(await slow.read(), Finished)


async def test_closing_frees_the_blocks(setup: _Setup) -> None:
    endless = SamplingParams(200, temperature=0.0)
    stream = setup.engine.submit(make_prompt([1, 2]), endless)
    await stream.read()

    setup.engine.close(stream.seq_id)
    await _read_all(setup.engine.submit(make_prompt([3]), GREEDY))

    assert setup.parts.blocks.num_used_blocks == 0
    assert setup.parts.engine.num_sequences == 0
    setup.engine.close(stream.seq_id)


async def test_cancelling_the_last_sequence_is_reported(setup: _Setup) -> None:
    stream = setup.engine.submit(make_prompt([1, 2]), SamplingParams(200, temperature=0.0))
    await stream.read()

    setup.last.went_idle.clear()
    setup.engine.close(stream.seq_id)

    assert await asyncio.to_thread(setup.last.went_idle.wait, 5.0)
    assert setup.last.state == EngineState(0, 0, 0, 64)


async def test_full_queue_refuses_before_any_work() -> None:
    setup = _Setup(max_waiting=2)
    for _ in range(2):
        setup.engine.submit(make_prompt([1]), GREEDY)

    with pytest.raises(OverloadedError):
        setup.engine.submit(make_prompt([1]), GREEDY)


async def test_first_token_makes_room_in_the_queue() -> None:
    setup = _Setup(max_waiting=1)
    setup.engine.start()
    stream = setup.engine.submit(make_prompt([1]), SamplingParams(240, temperature=0.0))
    await stream.read()

    other = setup.engine.submit(make_prompt([2]), GREEDY)

    assert (await _read_all(other))[0] == expected_tokens([2], 6)
    await setup.engine.stop()


async def test_draining_engine_finishes_what_it_has_and_takes_nothing_new(setup: _Setup) -> None:
    stream = setup.engine.submit(make_prompt([1]), GREEDY)

    setup.engine.drain()

    with pytest.raises(UnavailableError) as refused:
        setup.engine.submit(make_prompt([2]), GREEDY)
    assert refused.value.reason == "DRAINING"
    assert (await _read_all(stream))[0] == expected_tokens([1], 6)


async def test_stopping_ends_sequences_with_an_error() -> None:
    setup = _Setup()
    setup.engine.start()
    stream = setup.engine.submit(make_prompt([1]), SamplingParams(240, temperature=0.0))
    await stream.read()

    await setup.engine.stop()

    with pytest.raises(UnavailableError):
        await _read_all(stream)


async def test_death_of_the_thread_is_told_to_everyone() -> None:
    setup = _Setup()
    setup.engine.start()
    # Larger than the cache: admission should have refused it, so this is a bug.
    stream = setup.engine.submit(make_prompt([1] * 100), SamplingParams(500, temperature=0.0))

    with pytest.raises(EngineDeadError):
        await setup.engine.wait_dead()
    with pytest.raises(EngineDeadError):
        await stream.read()
    with pytest.raises(UnavailableError):
        setup.engine.submit(make_prompt([1]), GREEDY)
    await setup.engine.stop()


async def test_idle_engine_leaves_the_cores(setup: _Setup) -> None:
    await _read_all(setup.engine.submit(make_prompt([1]), GREEDY))

    await setup.engine.stop()

    assert setup.threads.num_steps == 6
    assert not setup.threads.is_busy


async def test_group_shares_its_prompt_and_each_member_ends_for_itself(setup: _Setup) -> None:
    prompt = [1, 2, 3, 4, 5]
    samplings = [SamplingParams(length, temperature=0.0) for length in (6, 2, 4)]

    streams = setup.engine.submit_group(make_prompt(prompt), samplings, Origin("a"))
    answers = await asyncio.gather(*(_read_all(stream) for stream in streams))

    assert [tokens for tokens, _ in answers] == [
        expected_tokens(prompt, length) for length in (6, 2, 4)
    ]
    assert setup.threads.num_steps == 6


async def test_group_that_does_not_fit_the_queue_leaves_nothing_in_it() -> None:
    setup = _Setup(max_waiting=2)
    samplings = [GREEDY] * 3

    with pytest.raises(OverloadedError):
        setup.engine.submit_group(make_prompt([1]), samplings, Origin())
    setup.engine.submit_group(make_prompt([1]), samplings[:2], Origin())

    assert setup.engine.num_sequences == 2
